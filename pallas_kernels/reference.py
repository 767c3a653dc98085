"""The plain definition of the operation: fp32, one full score matrix, ordinary autodiff."""

import dataclasses
import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import masks
from pallas_kernels.call import AttentionCall, PagedAttentionCall, RaggedAttentionCall
from pallas_kernels.masks import Mask
from pallas_kernels.pages import Pages
from pallas_kernels.sources import MixedSources, Result, as_array


def mixed(sources: Sequence[Array], weights: Array | None) -> Array:
    """The weighted sum of the sources in fp32, [B, S, K, H]."""
    if weights is None:
        return sources[0].astype(jnp.float32)
    terms = (
        weight.astype(jnp.float32) * source.astype(jnp.float32)
        for weight, source in zip(weights, sources, strict=True)
    )
    return functools.reduce(operator.add, terms)


def attention(call: AttentionCall) -> Result:
    """Attention by its formula; see `pallas_kernels.attention` for shapes.

    Memory grows as B * N * T * S: this is the yardstick of the tests, not something to run.

    Returns:
      The output [B, T, N, H'] in the dtype of q, and the log of the softmax's denominator
      [B, T, N] in float32.
    """
    q, mask, softcap = call.q, call.mask, call.softcap
    keys, values, key_weights, value_weights = call.sources
    batch, num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads = keys[0].shape[1:3]
    kv_positions = masks.key_positions(mask, num_keys)
    present = (kv_positions >= 0)[:, :, None, None]
    # The memory of an absent key may hold NaN, and 0 * NaN is NaN: remove it at the source.
    keys, values = ([jnp.where(present, as_array(x), 0) for x in side] for side in (keys, values))
    groups = num_heads // num_kv_heads
    key = jnp.repeat(mixed(keys, key_weights), groups, axis=2)  # [B, S, N, H]
    value = jnp.repeat(mixed(values, value_weights), groups, axis=2)  # [B, S, N, H']

    exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    scores = jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), key, **exact) * call.scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = masks.visible(
        mask,
        masks.query_positions(mask, num_queries, num_keys),
        kv_positions,
        mask.q_segment_ids,
        mask.kv_segment_ids,
    )
    seen = jnp.ones((1, 1, 1), bool) if seen is None else seen
    seen = jnp.broadcast_to(seen[:, None], scores.shape)

    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, where=seen, initial=-jnp.inf))
    top = jnp.where(jnp.isfinite(top), top, 0.0)[..., None]
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores - top, 0.0)), 0.0)
    total = weights.sum(axis=-1)  # [B, N, T]
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = jnp.einsum("bnts,bsnh->btnh", weights / total[..., None], value, **exact)
    lse = jnp.where(some, jnp.log(total) + top[..., 0], -jnp.inf)
    return out.astype(q.dtype), lse.transpose(0, 2, 1)


def gather(pages: Pages, page_table: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The keys and the values of all rows as tuples of float32 [B, max_pages * page_size, K, H]."""
    batch, count = page_table.shape
    length = count * pages.page_size

    def rows(x: Array) -> Array:  # [pages, K, page_size, .] to [B, S, K, .]
        x = x[page_table].swapaxes(2, 3)
        return x.reshape(batch, length, pages.num_kv_heads, x.shape[-1])

    data = rows(pages.data).astype(jnp.float32)
    streams = [data[..., start:stop] for start, stop in pages.spans()]
    if pages.scales is not None:
        scales = rows(pages.scales)
        streams = [x * scales[..., i : i + 1] for i, x in enumerate(streams)]
    return tuple(streams[: pages.num_keys]), tuple(streams[pages.num_keys :])


def paged_attention(call: PagedAttentionCall) -> Result:
    """Paged attention by its definition: all pages in a row; see `paged.paged_attention`."""
    sources = MixedSources(
        *gather(call.pages, call.page_table), call.key_weights, call.value_weights
    )
    return attention(
        AttentionCall(
            q=call.q, sources=sources, mask=call.mask, scale=call.scale, softcap=call.softcap
        )
    )


def ragged_attention(call: RaggedAttentionCall) -> Result:
    """Ragged attention by its definition: every query is a row of its own."""
    row, index = call.rows.owners(call.q.shape[0])
    position = (call.rows.lengths - call.rows.counts)[row] + index
    lengths = jnp.where(row < 0, 0, jnp.maximum(position + 1, 0))
    keys, values = (
        tuple(dataclasses.replace(x, table=x.table[row]) for x in side) for side in call.sources[:2]
    )
    out, lse = attention(
        AttentionCall(
            q=call.q[:, None],
            sources=call.sources._replace(keys=keys, values=values),
            mask=Mask(causal=True, window=call.window, kv_lengths=lengths),
            scale=call.scale,
            softcap=call.softcap,
        )
    )
    return out[:, 0], lse[:, 0]
