"""Decoding from contiguous arrays [B, S, K, H], with scales if they are stored in 8 bits.

In the loop of `decode_kernel` a block is some tokens of a row with all their heads, [tokens * K, H]
as memory has it:

    copy     one for each source, from wherever in the row its block begins
    scores   one product for all heads: a query sees the rows of its own head only
    outputs  p times the same rows; p is 0 in those of other heads
    clear    rows of absent keys
"""

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import linear
from pallas_kernels.masks import Mask
from pallas_kernels.quantized import Quantized
from pallas_kernels.sources import MixedSources, Result, Source, as_array
from pallas_kernels.tpu import chips, decode
from pallas_kernels.tpu import decode_inputs as inputs
from pallas_kernels.tpu import steps as steps_lib
from pallas_kernels.tpu.blocks import LANES
from pallas_kernels.tpu.decode import Cache
from pallas_kernels.tpu.decode_kernel import CacheReader, Memory, Method, Term
from pallas_kernels.tpu.how import How

_CHUNK = 2048  # rows that are multiplied at once: bounds the score tile


def _contiguous_copy(
    method: Method,
    row: Array,
    block: Array,
    slot: int | Array,
    memory: Memory,
    *,
    cut: inputs.BlockCut,
    heads: int,
) -> None:
    start = pl.multiple_of(cut.start(block) * heads, cut.align * heads)
    for stored, buffer in zip(memory.stored, memory.buffers, strict=True):
        source = stored.at[row, pl.ds(start, cut.tokens * heads)]
        getattr(pltpu.make_async_copy(source, buffer.at[slot], memory.sems.at[slot]), method)()


def _contiguous_read(
    buffer: Ref, slot: int | Array, head: int | Array, start: int, size: int, term: Term
) -> Array:
    del head, term
    return buffer[slot, pl.ds(start, size), :]


def _contiguous_clear(
    row: Array, block: Array, slot: int | Array, positions: Ref, memory: Memory
) -> None:
    del row, block
    there = positions[...].T < steps_lib.FAR  # [rows, 1]
    for buffer in memory.buffers:
        old = buffer[slot]
        buffer[slot] = jnp.where(there, old, jnp.zeros_like(old))


def check(how: How, sources: MixedSources) -> None:
    """Raises NotImplementedError unless the sources can be read in place."""
    both = (*sources.keys, *sources.values)
    inputs.check_lanes([x.shape[3] for x in both], "heads", how)
    for x in both:
        if isinstance(x, Quantized) and (not x.per_token or x.bits != 8):
            raise NotImplementedError("only 8-bit caches with one scale per token and head")
        chips.check_storage(how.chip, x.data.dtype if isinstance(x, Quantized) else x.dtype)


def contiguous(how: How, q: Array, sources: MixedSources, mask: Mask) -> Result:
    """(out, lse) of few queries over sources [B, S, K, H], arrays or `Quantized`.

    Raises:
      NotImplementedError: too many queries, or a storage that would have to be turned or unpacked.
    """
    inputs.check_fits(q)
    check(how, sources)
    stored, scales = _storage((*sources.keys, *sources.values))
    size, heads = stored[0].shape[1:3]
    token_bytes = sum(x[0, 0].size * x.dtype.itemsize for x in stored)
    rows_of_tile = 32 // min(x.dtype.itemsize for x in stored)
    cut = inputs.BlockCut.of(size, token_bytes, rows_of_tile // math.gcd(rows_of_tile, heads))

    def run(q: Array, mask: Mask) -> Result:
        return _blocks(how, q, sources, (stored, scales), (mask, cut))

    found = inputs.in_parts(run, q, mask, size, inputs.tokens_at_once(q.shape[2]))
    return inputs.with_tail(how, (q, sources, mask), cut, found)


def _blocks(
    how: How,
    q: Array,
    sources: MixedSources,
    storage: tuple[list[Array], list[Array] | None],
    masked: tuple[Mask, inputs.BlockCut],
) -> Result:
    """The kernel on the blocks of every row."""
    keys, values, key_weights, value_weights = sources
    (stored, scales), (mask, cut) = storage, masked
    batch, length, num, _ = q.shape
    size, heads = keys[0].shape[1:3]
    block = cut.tokens * heads
    chunk = next(c for c in range(min(block, _CHUNK), 0, -1) if block % c == 0)
    if chunk % LANES:
        chunk = block
    # [S * K, H] is the same memory as [S, K, H].
    flat = [x.reshape(batch, size * heads, x.shape[3]) for x in stored]

    rule = Mask(causal=mask.causal, window=mask.window)
    places = inputs.StepPlaces.of(mask, length, size, cut)
    visited = places.visited(rule, cut.tokens)
    visited = jnp.broadcast_to(visited, (batch, visited.shape[1]))
    pad = inputs.padded_rows(length * num) - length * num
    arrays = dict(places.rows(num, heads))
    if heads > 1:
        own = np.arange(length * num, dtype=np.int32)[None] % num // (num // heads)
        arrays["q_heads"] = jnp.pad(jnp.asarray(own), ((0, 0), (0, pad)), constant_values=-1)
        arrays["k_heads"] = jnp.asarray(np.arange(block, dtype=np.int32) % heads)[None, None]
    if scales is not None:
        stacked = jnp.stack(scales, axis=1)[..., 0].astype(jnp.float32)  # [B, terms, S, K]
        stacked = cut.in_blocks(stacked.swapaxes(2, 3), 0.0).swapaxes(2, 3)
        stacked = stacked.reshape(batch, 1, len(scales), -1)
        there = arrays["k_positions"][:, None] < steps_lib.FAR
        arrays["scales"] = jnp.where(there, stacked, 0.0)  # 0 * NaN is NaN

    queries = linear.fold_queries(q, key_weights, how.query_factor).reshape(
        batch, len(keys), length * num, -1
    )
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, pad), (0, 0))).astype(q.dtype)[:, None]
    form = CacheReader(
        heads=1,
        rows=block,
        chunk=chunk,
        scores=tuple(Term(j, 0, keys[0].shape[3]) for j in range(len(keys))),
        outputs=tuple(Term(len(keys) + j, 0, values[0].shape[3]) for j in range(len(values))),
        buffers=tuple((block, x.shape[2]) for x in flat),
        copy=functools.partial(_contiguous_copy, cut=cut, heads=heads),
        read=_contiguous_read,
        clear=_contiguous_clear,
    )
    out, lse = decode.run(how, rule, form, queries, Cache(flat, visited), arrays)
    out = out[:, 0, :, : length * num].reshape(batch, len(values), length, num, -1)
    out = linear.fold_outputs(out, value_weights).astype(q.dtype)
    return out, lse[:, 0, : length * num].reshape(batch, length, num)


def _storage(sources: Sequence[Source]) -> tuple[list[Array], list[Array] | None]:
    """The stored arrays and, if any is quantized, a [B, S, K, 1] scale for each."""
    if not any(isinstance(x, Quantized) for x in sources):
        return [as_array(x) for x in sources], None
    stored, scales = [], []
    for x in sources:
        if isinstance(x, Quantized):
            stored.append(x.data)
            scales.append(x.scale)
        else:
            stored.append(as_array(x))
            scales.append(jnp.ones((*x.shape[:3], 1), jnp.float32))
    return stored, scales
