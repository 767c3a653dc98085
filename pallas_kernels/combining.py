"""Attention over all keys from attention over parts of them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import checks

Part = tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]


def combine(parts: Sequence[Part]) -> Part:
    """Merge attention over disjoint sets of keys into attention over their union.

    lse = log sum_i exp(lse_i) and out = sum_i exp(lse_i - lse) out_i, differentiable. A part
    that sees nothing has lse -inf; if none sees anything the result is 0 and lse -inf.

    Args:
      parts: pairs (out, lse) as `attention(..., return_residuals=True)` gives them.

    Returns:
      The pair for all keys; the output in the dtype of the first part, lse in float32.

    Raises:
      ValueError: there are no parts, or their shapes differ.
    """
    if not parts:
        raise ValueError("parts is empty; it must be a sequence of (out, lse) pairs")
    for index, part in enumerate(parts):
        for name, array in zip(("out", "lse"), part, strict=True):
            checks.floats(f"parts[{index}], {name},", array)
    outs, lses = zip(*parts, strict=True)
    for index, (out, lse) in enumerate(parts):
        if out.shape != outs[0].shape or lse.shape != outs[0].shape[:3]:
            raise ValueError(
                f"parts[{index}] has shapes {out.shape} and {lse.shape}; with parts[0] they must "
                f"be {outs[0].shape} and {outs[0].shape[:3]}"
            )
    lse = jnp.stack([x.astype(jnp.float32) for x in lses])
    top = jax.lax.stop_gradient(lse.max(0))
    top = jnp.where(jnp.isneginf(top), 0.0, top)  # -inf - -inf would be NaN
    shares = jnp.exp(lse - top)  # [parts, B, T, N]
    total = shares.sum(0)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    weighted = sum(
        share[..., None] * jnp.where(share[..., None] > 0, out.astype(jnp.float32), 0)
        for share, out in zip(shares, outs, strict=True)
    )
    out = (weighted / total[..., None]).astype(outs[0].dtype)
    return out, jnp.where(some, jnp.log(total) + top, -jnp.inf)
