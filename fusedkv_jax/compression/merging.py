"""Two layers' tokens as one direction and two norms (MiniCache), and back."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

_TINY = 1e-7  # distance of a cosine from 1 and -1
_STRAIGHT = 1e-3  # sine of an angle below which the arc is taken for a line


def merge(
    lower: Float[Array, "*P B S K H"],
    upper: Float[Array, "*P B S K H"],
    share: float,
    heads: int,
) -> tuple[Float[Array, "*P B S K H"], Float[Array, "*P2 B S R"], Float[Array, "*P B S R"]]:
    """One direction for two layers' tokens, by spherical interpolation (MiniCache, section 4.2).

    Args:
        lower: tokens of the lower layer of each pair.
        upper: tokens of the upper layer.
        share: of the upper layer, t.
        heads: parts R into which a token is cut: 1 for its whole width, or K.

    Returns:
        Directions; norms [2P, B, S, R], of lower and upper layers alternately; and the
        angle between the layers over pi.
    """
    shape = lower.shape
    pair = [x.astype(jnp.float32).reshape(*shape[:-2], heads, -1) for x in (lower, upper)]
    norms = [jnp.linalg.norm(x, axis=-1, keepdims=True) for x in pair]
    a, b = (x / jnp.where(norm > 0, norm, 1) for x, norm in zip(pair, norms, strict=True))
    cosine = jnp.clip((a * b).sum(-1, keepdims=True), -1 + _TINY, 1 - _TINY)
    angle = jnp.arccos(cosine)
    sine = jnp.sin(angle)
    straight = sine < _STRAIGHT
    sine = jnp.where(straight, 1, sine)
    low = jnp.where(straight, 1 - share, jnp.sin((1 - share) * angle) / sine)
    high = jnp.where(straight, share, jnp.sin(share * angle) / sine)
    direction = (low * a + high * b).reshape(shape)
    both = jnp.stack(norms, axis=1)[..., 0]  # [P, 2, B, S, R]
    return direction, both.reshape(-1, *both.shape[2:]), angle[..., 0] / jnp.pi


def restore(
    direction: Float[Array, "B S K H"], norms: Float[Array, "B S R"]
) -> Float[Array, "B S K H"]:
    """The tokens of one layer: directions times its norms."""
    cut = direction.reshape(*norms.shape, -1)
    return (cut * norms[..., None]).reshape(direction.shape)
