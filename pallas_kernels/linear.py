"""What is linear around every kernel's gradient: cotangents of the output, and gradients of a mix.

The reference does without: it is the yardstick, and autodiff differentiates it. Triton has its own.
"""

from typing import Any

import jax.numpy as jnp


def statistics(out: Any, lse: Any, cotangents: Any, blind_lse: float) -> tuple[Any, Any, Any]:
    """What a backward kernel reads of each row, with rows that see nothing made harmless.

    Args:
      out: output [B, T, N, H'].
      lse: log of the softmax's denominator, [B, T, N], -inf where a row sees nothing.
      cotangents: those of both.
      blind_lse: the lse for rows that see nothing; so large that exp(score - lse) is 0.

    Returns:
      (dout, lse, delta), delta = sum(out * dout) - dlse in float32.
    """
    dout, dlse = cotangents
    blind = jnp.isneginf(lse)
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1)
    # Combining parts of the keys can make the cotangents of a blind row NaN, and 0 * NaN is NaN.
    delta = jnp.where(blind, 0, delta - dlse)
    dout = jnp.where(blind[..., None], 0, dout)
    return dout, jnp.where(blind, blind_lse, lse), delta


def unmix(grad: Any, sources: Any, weights: Any, present: Any) -> tuple[Any, Any]:
    """Gradients of the sources and of the weights from that of their mix.

    Args:
      grad: float32 [B, S, K, H].
      sources: J arrays [B, S, K, H].
      weights: [J, K, H], or None for one source.
      present: bool [B or 1, S, 1, 1], which keys are present; None for all.

    Returns:
      J gradients in the types of the sources, and that of the weights, or None.
    """
    if weights is None:
        return (grad.astype(sources[0].dtype),), None
    wide = weights.astype(jnp.float32)
    dsources = tuple((w * grad).astype(x.dtype) for w, x in zip(wide, sources, strict=True))
    if present is not None:  # the memory of an absent key may hold NaN
        sources = [jnp.where(present, x, 0) for x in sources]
    dweights = [(x.astype(jnp.float32) * grad).sum((0, 1)) for x in sources]
    return dsources, jnp.stack(dweights).astype(weights.dtype)
