"""Schedule for short calls: a block of queries meets all its keys in one softmax.

mix key and value of all tokens
for each block of queries, with the span of keys that a causal mask or a window leaves it:
    forward    p = exp(q.key^T - max); out = p.value / sum p, and lse
    backward   dq of the block; dkey and dvalue of its span += `tiles.gradients`
"""

import jax.numpy as jnp
from jax import Array

from pallas_kernels import linear
from pallas_kernels.masks import Mask
from pallas_kernels.xla import tiles
from pallas_kernels.xla.chunk import RowChunk
from pallas_kernels.xla.tiles import Cotangents


def spans(
    mask: Mask, num_queries: int, num_keys: int, block: int
) -> list[tuple[int, int, int, int]]:
    """Blocks of queries with the keys they may see: (query start, stop, key start, stop).

    With static alignment the mask's bounds are known while tracing, so half of a causal call
    is never computed; otherwise every block meets every key.
    """
    result = []
    for start in range(0, num_queries, block):
        stop = min(start + block, num_queries)
        low, high = 0, num_keys
        if mask.aligned:
            offset = num_keys - num_queries
            if mask.causal:
                high = max(0, min(num_keys, offset + stop))
            if mask.window is not None:
                low = max(0, min(high, offset + start - mask.window + 1)) // 16 * 16
        result.append((start, stop, low, high))
    return result


def _spans(chunk: RowChunk) -> list[tuple[int, int, int, int]]:
    length, num_keys = chunk.q.shape[1], chunk.sources[0].length
    return spans(chunk.mask, length, num_keys, chunk.plan.queries)


def _mixed(chunk: RowChunk) -> tuple[Array, Array]:
    """The mixed key [B, K, S, H] and value [B, K, S, H']."""
    streams, key_weights, value_weights = chunk.sources
    keys, values = streams.tile(0, streams.length)
    present = (chunk.keys.positions >= 0)[:, :, None, None] if chunk.mask.ragged else None
    key = linear.mix(keys, key_weights, chunk.q.dtype, present)
    value = linear.mix(values, value_weights, chunk.q.dtype, present)
    return key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)


def forward(chunk: RowChunk) -> tuple[Array, Array]:
    """Output [B, T, N, H'] and lse [B, T, N] in fp32."""
    q, groups = chunk.q, chunk.groups
    key, value = _mixed(chunk)
    batch, heads = key.shape[:2]
    outs, lses = [], []
    for start, stop, low, high in _spans(chunk):
        if low == high:
            shape = (batch, stop - start, q.shape[2])
            outs.append(jnp.zeros((*shape, value.shape[3]), jnp.float32))
            lses.append(jnp.full((*shape, 1), -jnp.inf, jnp.float32))
            continue
        seen = tiles.hide(chunk.mask, chunk.queries[:, start:stop], chunk.keys[:, low:high], groups)
        query = tiles.to_rows(q[:, start:stop], heads)
        score = tiles.logits(chunk.how, query, key[:, :, low:high], seen)
        # A blind row has only HIDDEN; a higher anchor makes its weights exact zeros.
        top = jnp.maximum(score.max(-1, keepdims=True), tiles.HIDDEN / 2)  # [B, K, R, 1]
        weight = jnp.exp(score - top)
        total = weight.sum(-1, keepdims=True)
        out = tiles.product(weight.astype(value.dtype), value[:, :, low:high], 3, 2)
        out, lse = tiles.finish(top, total, out)
        outs.append(tiles.from_rows(out, groups))
        lses.append(tiles.from_rows(lse, groups))
    return jnp.concatenate(outs, 1), jnp.concatenate(lses, 1)[..., 0]


def backward(chunk: RowChunk, rows: Cotangents) -> tuple[Array, Array, Array]:
    """Gradients dq [B, T, N, H], dkey [B, S, K, H], dvalue [B, S, K, H'] in fp32."""
    q, groups = chunk.q, chunk.groups
    key, value = _mixed(chunk)
    heads = key.shape[1]
    lse, dout, delta = rows
    dqs = []
    dkey = jnp.zeros_like(key.swapaxes(2, 3), jnp.float32)
    dvalue = jnp.zeros_like(value.swapaxes(2, 3), jnp.float32)
    for start, stop, low, high in _spans(chunk):
        if low == high:
            dqs.append(jnp.zeros_like(q[:, start:stop], jnp.float32))
            continue
        query, dout_, lse_, delta_ = (
            tiles.to_rows(x[:, start:stop], heads)
            for x in (q, dout, lse[..., None], delta[..., None])
        )
        seen = tiles.hide(chunk.mask, chunk.queries[:, start:stop], chunk.keys[:, low:high], groups)
        key_, value_ = key[:, :, low:high], value[:, :, low:high]
        dq, dkey_part, dvalue_part = tiles.gradients(
            chunk.how, query, key_, value_, seen,
            Cotangents(lse_[..., 0], dout_, delta_[..., 0]),
        )  # fmt: skip
        dqs.append(tiles.from_rows(dq, groups))
        dkey = dkey.at[..., low:high].add(dkey_part)
        dvalue = dvalue.at[..., low:high].add(dvalue_part)
    return jnp.concatenate(dqs, 1), dkey.transpose(0, 3, 1, 2), dvalue.transpose(0, 3, 1, 2)
