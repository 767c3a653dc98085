"""Attention in plain XLA operations, in linear memory: the CPU default and the fallback."""

import functools
from collections.abc import Callable

import jax
from jax import Array

from pallas_kernels import linear, stacked
from pallas_kernels.call import AttentionCall, PagedAttentionCall, RaggedAttentionCall
from pallas_kernels.masks import Mask
from pallas_kernels.paged_stream import is_paged
from pallas_kernels.quantized import is_quantized
from pallas_kernels.sources import Result, named
from pallas_kernels.xla import blocks as blocks_schedule
from pallas_kernels.xla import decode, ragged, rows, tiles
from pallas_kernels.xla.chunk import RowChunk
from pallas_kernels.xla.plan import BlockPlan
from pallas_kernels.xla.streams import ArraySources, PagedSources, Weighted
from pallas_kernels.xla.tiles import Scores

_Arrays = tuple[ArraySources, Array | None, Array | None]  # and weights of keys and values
_Residuals = tuple[Array, _Arrays, Mask, Array, Array]  # q, sources, mask, out, lse

_FORWARD = {"rows": rows.forward, "blocks": blocks_schedule.forward, "decode": decode.forward}
_BACKWARD = {"rows": rows.backward, "blocks": blocks_schedule.backward}


def attention(call: AttentionCall, *, blocks: tuple[BlockPlan, BlockPlan] | None = None) -> Result:
    """Attention without a [T, S] array; result as of `reference.attention`.

    Residuals of the backward pass are the arguments, the output and the lse; scores and mixed
    keys are computed again.

    Args:
      blocks: `BlockPlan` of the forward and of the backward pass; by default what they choose.
    """
    keys, values, key_weights, value_weights = call.sources
    streams = ArraySources(keys, values)
    how = Scores(scale=call.scale, softcap=call.softcap)
    sources = (streams, key_weights, value_weights)
    if is_paged((*keys, *values)):
        return _paged(how, call.q, sources, call.mask)
    if blocks is None:
        shapes = (call.q.shape, keys[0].shape, call.mask)
        blocks = (BlockPlan.choose(*shapes), BlockPlan.choose_backward(*shapes))
    quantized = is_quantized((*keys, *values))
    plans = (blocks[0].fit(streams.group, quantized), blocks[1].fit(streams.group, quantized))
    return _attend(how, plans, call.q, sources, call.mask)


def paged_attention(call: PagedAttentionCall) -> Result:
    """Attention over pages, a few of each row at a time; see `paged.paged_attention`."""
    streams = PagedSources(call.pages, call.page_table)
    how = Scores(scale=call.scale, softcap=call.softcap)
    return _paged(how, call.q, (streams, call.key_weights, call.value_weights), call.mask)


def ragged_attention(call: RaggedAttentionCall) -> Result:
    """Attention of the queries of many rows over pages, as calls with equal rows."""
    return ragged.attention(call, attention)


def _paged(how: Scores, q: Array, sources: Weighted, mask: Mask) -> Result:
    """The forward pass, which gathers a tile of tokens of all rows at a time."""
    streams = sources[0]
    shape = (q.shape[0], streams.length, streams.heads, q.shape[3])
    blocks = BlockPlan.choose_paged(q.shape, shape).fit(streams.group, streams.quantized)
    places = tiles.places(mask, q.shape[1], streams.length)
    chunk = RowChunk(
        how=how, mask=mask, plan=blocks, q=q, sources=sources, queries=places[0], keys=places[1]
    )
    out, lse = _FORWARD[blocks.schedule](chunk)
    return out.astype(q.dtype), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    how: Scores, blocks: tuple[BlockPlan, BlockPlan], q: Array, sources: _Arrays, mask: Mask
) -> Result:
    return _forward(how, blocks, q, sources, mask)[0]


def _forward(
    how: Scores, both_blocks: tuple[BlockPlan, BlockPlan], q: Array, sources: _Arrays, mask: Mask
) -> tuple[Result, _Residuals]:
    blocks = both_blocks[0]
    run = _FORWARD[blocks.schedule]

    def chunk(arrays: tuple) -> tuple[Array, ...]:
        q, streams, (queries, keys) = arrays
        weighted = (streams, *sources[1:])
        out, lse = run(
            RowChunk(
                how=how, mask=mask, plan=blocks, q=q, sources=weighted, queries=queries, keys=keys
            )
        )
        return out.astype(q.dtype), lse

    places = tiles.places(mask, q.shape[1], sources[0].length)
    # What lies in a stacked array has its rows on the second axis: rows by rows it is cut out.
    streams = sources[0] if blocks.batch == q.shape[0] else _apart(sources[0])
    out, lse = _over_batch(chunk, blocks.batch, (q, streams, places))
    out, lse = named(out, lse)
    return (out, lse), (q, sources, mask, out, lse)


def _backward(
    how: Scores, both_blocks: tuple[BlockPlan, BlockPlan], residuals: _Residuals, cotangents: Result
) -> tuple[Array, _Arrays, None]:
    blocks = both_blocks[1]
    run = _BACKWARD[blocks.schedule]
    q, sources, mask, out, lse = residuals
    stored, key_weights, value_weights = sources
    streams, to_stored = jax.vjp(_apart, stored)
    places = tiles.places(mask, q.shape[1], streams.length)

    def chunk(arrays: tuple) -> tuple[Array, ...]:
        q, streams, (queries, keys), out, lse, dout, dlse = arrays
        dout, lse, delta = linear.statistics(out, lse, (dout, dlse), -tiles.HIDDEN)
        weighted = (streams, key_weights, value_weights)
        grads = run(
            RowChunk(
                how=how, mask=mask, plan=blocks, q=q, sources=weighted, queries=queries, keys=keys
            ),
            tiles.Cotangents(lse, dout.astype(q.dtype), delta),
        )
        return grads[0].astype(q.dtype), *grads[1:]

    arrays = (q, streams, places, out, lse, *cotangents)
    dq, dkey, dvalue = _over_batch(chunk, blocks.batch, arrays)
    present = (places[1].positions >= 0)[:, :, None, None] if mask.ragged else None
    dkeys, dkey_weights = linear.unmix(dkey, streams.keys, key_weights, present)
    dvalues, dvalue_weights = linear.unmix(dvalue, streams.values, value_weights, present)
    (grads,) = to_stored(ArraySources(dkeys, dvalues))
    return dq, (grads, dkey_weights, dvalue_weights), None


_attend.defvjp(_forward, _backward)


def _apart(streams: ArraySources) -> ArraySources:
    """Every source as an array of its own."""
    return ArraySources(stacked.read(streams.keys), stacked.read(streams.values))


def _over_batch(
    function: Callable[[tuple], tuple[Array, ...]], chunk: int, arrays: tuple
) -> tuple[Array, ...]:
    """Maps `function` over chunks of the leading axis; arrays of one row serve every chunk."""
    batch = arrays[0].shape[0]
    if chunk == batch:
        return function(arrays)
    leaves, tree = jax.tree.flatten(arrays)
    shared = [x.shape[0] == 1 for x in leaves]
    split = [
        x.reshape(-1, chunk, *x.shape[1:])
        for x, same in zip(leaves, shared, strict=True)
        if not same
    ]

    def step(parts: list[Array]) -> tuple[Array, ...]:
        rest = iter(parts)
        merged = [x if same else next(rest) for x, same in zip(leaves, shared, strict=True)]
        return function(jax.tree.unflatten(tree, merged))

    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), jax.lax.map(step, split))
