"""Schedule for a few queries against a long cache: it reads the cache once, and never mixes it.

All KV heads share one product: the cache is read as the matrix [S, K * H] that it is in memory,
against queries that are zero outside the columns of their own KV head. That multiplies FLOPs by
K, which a step that waits for memory does not feel, and spares the transposition of the cache
that a product per head costs. Against the grouped einsum on two CPU cores (fp32, H = 64):
0.74x its time for B, S, N, K = 1, 4096, 16, 4 and 0.38x for 8, 1024, 16, 4.

Weights of several sources fold into the queries and the outputs:
(sum_j a_j K_j) q = sum_j K_j (a_j q), and alike for the values.
"""

import functools
import operator

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels import masks
from pallas_kernels.quantized import Quantized
from pallas_kernels.xla import blocks, tiles
from pallas_kernels.xla.chunk import RowChunk

_Sums = tuple[Array, Array, tuple[Array, ...]]  # maximum, denominator, outputs of each source


def _spread(x: Array, weight: Array | None, heads: int) -> Array:
    """Queries [B, T, N, H] times weight [K, H] as [B, T * N, K * H], zero off the own head."""
    batch, length, num, size = x.shape
    x = x.reshape(batch, length, heads, num // heads, 1, size).astype(jnp.float32)
    if weight is not None:
        x = x * weight.astype(jnp.float32)[:, None, None]
    x = x * jnp.eye(heads, dtype=jnp.float32)[:, None, :, None]
    return x.reshape(batch, length * num, heads * size)


def _collect(x: Array, weight: Array | None, heads: int, length: int) -> Array:
    """Outputs [B, T * N, K * H'] back to [B, T, N, H'], times weight [K, H']."""
    batch, rows, width = x.shape
    size = width // heads
    x = x.reshape(batch, length, heads, -1, heads, size)
    # Slices, not a sum under an identity: jaxlib 0.10.2 miscompiles that sum on CPUs.
    x = jnp.stack([x[:, :, head, :, head] for head in range(heads)], axis=2)
    if weight is not None:
        x = x * weight.astype(jnp.float32)[:, None]
    return x.reshape(batch, length, rows // length, size)


def _product(x: Array, y: Array, contract_y: int) -> Array:
    dims = (((2,), (contract_y,)), ((0,), (0,)))
    return lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _per_row(scale: Array, shape: tuple[int, int, int, int]) -> Array:
    """Scales [B, S, K, 1] of tokens and heads for rows [B, T * N, S]: each its own head's."""
    batch, length, num, block = shape
    heads = scale.shape[2]
    scale = scale[..., 0].astype(jnp.float32).transpose(0, 2, 1)[:, None, :, None]
    scale = jnp.broadcast_to(scale, (batch, length, heads, num // heads, block))
    return scale.reshape(batch, length * num, block)


def _scores(q: Array, key: Array | Quantized, shape: tuple[int, int, int, int]) -> Array:
    """Products [B, T * N, S] of the spread queries with one source."""
    scale = None
    if isinstance(key, Quantized) and key.per_token:
        # A score takes its key's scale after the product: one factor instead of one a channel.
        scale, key = _per_row(key.scale, shape), key.codes(q.dtype)
    elif isinstance(key, Quantized):
        key = key.dequantize(q.dtype)
    score = _product(q, key.reshape(*key.shape[:2], -1).astype(q.dtype), 2)
    return score if scale is None else score * scale


def _read(
    weight: Array,
    value: Array | Quantized,
    present: Array | None,
    shape: tuple[int, int, int, int],
    dtype: DTypeLike,
) -> Array:
    """The sum of one source's values [B, T * N, K * H'] under the weights [B, T * N, S]."""
    if isinstance(value, Quantized) and value.per_token:
        scale, value = value.scale, value.codes(dtype)
        if present is not None:
            scale = jnp.where(present, scale, 0)
        weight = weight * _per_row(scale, shape)
    elif isinstance(value, Quantized):
        value = value.dequantize(dtype)
    if present is not None:  # the memory of an absent value may hold NaN
        value = jnp.where(present, value, 0)
    return _product(weight.astype(dtype), value.reshape(*value.shape[:2], -1).astype(dtype), 1)


def forward(chunk: RowChunk) -> tuple[Array, Array]:
    """Output [B, T, N, H'] and lse [B, T, N] in fp32."""
    how, mask, q, block = chunk.how, chunk.mask, chunk.q, chunk.plan.keys
    queries, where = chunk.queries, chunk.keys
    streams, key_weights, value_weights = chunk.sources
    batch, length, num, _ = q.shape
    num_keys, heads = streams.length, streams.heads
    rows, shape = (batch, length * num), (batch, length, num, block)
    key_weights = [None] if key_weights is None else key_weights
    value_weights = [None] if value_weights is None else value_weights
    folded = [_spread(q, w, heads).astype(q.dtype) for w in key_weights]  # J x [B, T * N, K * H]

    def visit(index: int | Array, carry: _Sums) -> _Sums:
        top, total, outs = carry
        start = jnp.minimum(index * block, num_keys - block)
        keys, values = streams.tile(start, block)
        place = tiles.part(where, start, block)
        parts = [_scores(x, key, shape) for x, key in zip(folded, keys, strict=True)]
        score = tiles.cap(how, functools.reduce(operator.add, parts))  # [B, T * N, block]
        seen = masks.visible(
            mask, queries.positions, place.positions, queries.segment_ids, place.segment_ids
        )
        if num_keys % block:  # the last block is moved back to end with the keys
            fresh = (start + jnp.arange(block) >= index * block)[None, None]
            seen = fresh if seen is None else seen & fresh
        if seen is not None:
            seen = jnp.broadcast_to(seen[:, :, None], (seen.shape[0], length, num, block))
            score = jnp.where(seen.reshape(seen.shape[0], -1, block), score, tiles.HIDDEN)
        higher = jnp.maximum(top, score.max(-1, keepdims=True))
        decay, weight = jnp.exp(top - higher), jnp.exp(score - higher)
        total = total * decay + weight.sum(-1, keepdims=True)
        present = (place.positions >= 0)[:, :, None, None] if mask.ragged else None
        outs = tuple(
            out * decay + _read(weight, x, present, shape, q.dtype)
            for out, x in zip(outs, values, strict=True)
        )
        return higher, total, outs

    width = heads * streams.value_size
    carry = (
        jnp.full((*rows, 1), tiles.HIDDEN / 2, jnp.float32),
        jnp.zeros((*rows, 1), jnp.float32),
        tuple(jnp.zeros((*rows, width), jnp.float32) for _ in value_weights),
    )
    if block == num_keys:
        top, total, outs = visit(0, carry)
    else:
        order, count = blocks.visits(blocks.active(mask, queries, where, length, block))
        top, total, outs = lax.fori_loop(0, count[0], lambda i, c: visit(order[0, i], c), carry)
    parts = (_collect(x, w, heads, length) for x, w in zip(outs, value_weights, strict=True))
    out = functools.reduce(operator.add, parts)
    top, total = (x.reshape(batch, length, num, 1) for x in (top, total))
    out, lse = tiles.finish(top, total, out)
    return out, lse[..., 0]
