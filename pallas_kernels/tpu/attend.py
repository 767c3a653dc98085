"""The differentiable call: arrays in the kernels' order, one `custom_vjp` for every kernel."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import linear
from pallas_kernels.masks import Mask
from pallas_kernels.sources import MixedSources, Result, Source, as_array, named
from pallas_kernels.tpu import steps as steps_lib
from pallas_kernels.tpu import tile, tile_backward
from pallas_kernels.tpu.how import How

Residuals = tuple[Array, MixedSources, Mask, Array, Array]  # q, sources, mask, out, lse


def stack(x: Array, heads: int, block: int, fill: float = 0.0) -> Array:
    """[B, T, N, H] to [B, K, blocks, G * block, H]: the heads of a group, then the tokens."""
    batch, length, num, size = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)), constant_values=fill)
    x = x.reshape(batch, -1, block, heads, num // heads, size).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(*x.shape[:3], -1, size)


def unstack(x: Array, block: int, length: int) -> Array:
    """The inverse of `stack`."""
    batch, heads, count, rows, size = x.shape
    x = x.reshape(batch, heads, count, rows // block, block, size).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, count * block, -1, size)[:, :length]


def scaled(q: Array, how: How) -> Array:
    """Queries times their factor, rounded once."""
    return (q.astype(jnp.float32) * how.query_factor).astype(q.dtype)


def kernel_order(q: Array, sources: MixedSources) -> MixedSources:
    """Sources as [B, K, S, H] in the dtype of q, weights as [K, J, H] fp32."""

    def side(stored: Sequence[Source]) -> tuple[Array, ...]:
        return tuple(as_array(x).astype(q.dtype).transpose(0, 2, 1, 3) for x in stored)

    def by_head(weights: Array | None) -> Array | None:
        return None if weights is None else weights.astype(jnp.float32).transpose(1, 0, 2)

    return MixedSources(
        side(sources.keys),
        side(sources.values),
        by_head(sources.key_weights),
        by_head(sources.value_weights),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tiled(how: How, q: Array, sources: MixedSources, mask: Mask) -> Result:
    """(out, lse) by the tile kernel; arguments as of `AttentionCall`."""
    return _forward(how, q, sources, mask)[0]


def _forward(how: How, q: Array, sources: MixedSources, mask: Mask) -> tuple[Result, Residuals]:
    length, keys = q.shape[1], sources.keys[0]
    heads = keys.shape[2]
    blocks = how.tile(q, sources)
    where = steps_lib.places(mask, length, keys.shape[1], blocks.queries, blocks.keys)
    rule = Mask(causal=mask.causal, window=mask.window)
    out, lse = tile.forward(
        how, rule, blocks, stack(scaled(q, how), heads, blocks.queries),
        kernel_order(q, sources), where,
    )  # fmt: skip
    out = unstack(out, blocks.queries, length)
    lse = unstack(lse.swapaxes(3, 4), blocks.queries, length)[..., 0]
    out, lse = named(out, lse)
    return (out, lse), (q, sources, mask, out, lse)


def _backward(
    how: How, residuals: Residuals, cotangents: Result
) -> tuple[Array, MixedSources, None]:
    return (*gradients(how, residuals, cotangents), None)


tiled.defvjp(_forward, _backward)


def gradients(how: How, residuals: Residuals, cotangents: Result) -> tuple[Array, MixedSources]:
    """Gradients of the queries and of the sources, by the tile kernel."""
    q, sources, mask, out, lse = residuals
    length, keys = q.shape[1], sources.keys[0]
    heads = keys.shape[2]
    blocks = how.tile(q, sources)
    dout, lse, delta = linear.statistics(out, lse, cotangents, tile_backward.BLIND)
    where = steps_lib.places(mask, length, keys.shape[1], blocks.queries, blocks.keys)
    rule = Mask(causal=mask.causal, window=mask.window)
    stacked = functools.partial(stack, heads=heads, block=blocks.queries)
    arrays = {
        "q": stacked(scaled(q, how)),
        "dout": stacked(dout.astype(q.dtype)),
        "lse": stacked(lse[..., None] * tile.LOG2E, fill=tile_backward.BLIND).swapaxes(3, 4),
        "delta": stacked(delta[..., None]).swapaxes(3, 4),
    }
    dq, dkey, dvalue = tile_backward.backward(
        how, rule, blocks, arrays, kernel_order(q, sources), where
    )
    dkey = dkey * (how.scale / how.query_factor)
    present = None
    if mask.ragged:  # an absent source may hold NaN
        present = (where.k_positions < steps_lib.FAR)[:, : keys.shape[1], None, None]
    dkeys, dkey_weights = linear.unmix(
        dkey.transpose(0, 2, 1, 3), sources.keys, sources.key_weights, present
    )
    dvalues, dvalue_weights = linear.unmix(
        dvalue.transpose(0, 2, 1, 3), sources.values, sources.value_weights, present
    )
    dsources = MixedSources(dkeys, dvalues, dkey_weights, dvalue_weights)
    return unstack(dq, blocks.queries, length), dsources
