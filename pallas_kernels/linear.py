"""What is linear around every kernel: mixes and their gradients, folded weights, cotangents.

The reference does without: it is the yardstick, and autodiff differentiates it.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.sources import Result, Source, as_array


def mix(
    sources: Sequence[Source],
    weights: Array | None,
    dtype: DTypeLike,
    present: Array | np.ndarray | None = None,
) -> Array:
    """The weighted sum of the sources [B, S, K, H], in float32 and rounded to `dtype` once.

    Args:
      sources: J arrays or `Quantized`.
      weights: [J, K, H], or None for one source.
      dtype: of the result.
      present: bool [B or 1, S, 1, 1], which keys are present; None for all. Absent keys become
        zero: their memory may hold NaN, and 0 * NaN would reach every row.
    """
    plain = [as_array(x) for x in sources]
    total = plain[0]
    if weights is not None:
        wide = weights.astype(jnp.float32)
        total = wide[0] * plain[0].astype(jnp.float32)
        for weight, source in zip(wide[1:], plain[1:], strict=True):
            total = total + weight * source.astype(jnp.float32)
    if present is not None:
        total = jnp.where(present, total, 0)
    return total.astype(dtype)


def fold_queries(q: Array, weights: Array | None, factor: float = 1.0) -> Array:
    """Queries for each source, [B, J, T, N, H] fp32: (sum_j a_j K_j) q = sum_j K_j (a_j q).

    Args:
      q: [B, T, N, H].
      weights: a [J, K, H], or None for one source.
      factor: what the queries are multiplied with besides.
    """
    # The weights meet T queries here, instead of the S keys that a mix would multiply: while
    # decoding there are many more of these, and each layer would mix all of them again.
    batch, length, num, size = q.shape
    wide = q.astype(jnp.float32) * factor
    if weights is None:
        return wide[:, None]
    heads = weights.shape[1]
    grouped = wide.reshape(batch, 1, length, heads, num // heads, size)
    wide = grouped * weights.astype(jnp.float32)[None, :, None, :, None]
    return wide.reshape(batch, -1, length, num, size)


def fold_outputs(parts: Array, weights: Array | None) -> Array:
    """The weighted sum of what each source gave, [B, J, T, N, H] fp32, as [B, T, N, H]."""
    if weights is None:
        return parts[:, 0]
    batch, sources, length, num, size = parts.shape
    heads = weights.shape[1]
    grouped = parts.reshape(batch, sources, length, heads, num // heads, size)
    wide = grouped * weights.astype(jnp.float32)[None, :, None, :, None]
    return wide.sum(1).reshape(batch, length, num, size)


def statistics(
    out: Array, lse: Array, cotangents: Result, blind_lse: float
) -> tuple[Array, Array, Array]:
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


def unmix(
    grad: Array,
    sources: Sequence[Source],
    weights: Array | None,
    present: Array | np.ndarray | None,
) -> tuple[tuple[Array, ...], Array | None]:
    """Gradients of the sources and of the weights from that of their mix.

    Args:
      grad: float32 [B, S, K, H].
      sources: J arrays [B, S, K, H].
      weights: [J, K, H], or None for one source.
      present: bool [B or 1, S, 1, 1], which keys are present; None for all.

    Returns:
      J gradients in the types of the sources, and that of the weights, or None.
    """
    plain = [as_array(x) for x in sources]
    if weights is None:
        return (grad.astype(plain[0].dtype),), None
    wide = weights.astype(jnp.float32)
    # dX_j = w_j dM: kernels write one gradient, that of the mix, not one for each source.
    dsources = tuple((w * grad).astype(x.dtype) for w, x in zip(wide, plain, strict=True))
    if present is not None:  # the memory of an absent key may hold NaN
        plain = [jnp.where(present, x, 0) for x in plain]
    dweights = [(x.astype(jnp.float32) * grad).sum((0, 1)) for x in plain]
    return dsources, jnp.stack(dweights).astype(weights.dtype)
