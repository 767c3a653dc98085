"""Decoding from the stacked array of a cache, [P, B, S, K * H], which is never cut or turned.

    scores   q [M, K * H] . block [tokens, K * H]^T     a query is zero off its own head
    outputs  p [M, tokens] . block [tokens, K * H']     and keeps its own head's part

The kernel's copies find slot and row, so the operand is the cache itself. A product has K times the
FLOPs of one per head, which a step that waits for memory does not feel, and lanes are full whatever
H is: only K * H must be a multiple of 128.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import linear
from pallas_kernels.masks import Mask
from pallas_kernels.sources import MixedSources, Result
from pallas_kernels.stacked import Stacked
from pallas_kernels.tpu import chips, decode
from pallas_kernels.tpu import decode_inputs as inputs
from pallas_kernels.tpu import steps as steps_lib
from pallas_kernels.tpu.blocks import LANES
from pallas_kernels.tpu.decode import Cache
from pallas_kernels.tpu.decode_kernel import CacheReader, Memory, Method, Term
from pallas_kernels.tpu.how import How


def _copy(
    method: Method,
    row: Array,
    block: Array,
    slot: int | Array,
    memory: Memory,
    *,
    cut: inputs.BlockCut,
) -> None:
    start = pl.multiple_of(cut.start(block), cut.align)
    for index, (stored, buffer) in enumerate(zip(memory.stored, memory.buffers, strict=True)):
        source = stored.at[memory.table[index], row, pl.ds(start, cut.tokens)]
        getattr(pltpu.make_async_copy(source, buffer.at[slot], memory.sems.at[slot]), method)()


def _read(
    buffer: Ref, slot: int | Array, head: int | Array, start: int, size: int, term: Term
) -> Array:
    del head, term
    return buffer[slot, pl.ds(start, size), :]


def _clear(
    row: Array,
    block: Array,
    slot: int | Array,
    positions: Ref,
    memory: Memory,
    *,
    tokens: int,
    first: int,
) -> None:
    """Zeroes absent values, where there are any: scores of absent keys are masked anyway."""
    del row, block
    size = LANES if tokens % LANES == 0 else tokens

    def piece(index: Array, _: None) -> None:
        part = pl.ds(pl.multiple_of(index * size, size), size)
        there = positions[:, part]

        @pl.when(jnp.max(there) >= steps_lib.FAR)
        def _() -> None:
            column = there.T < steps_lib.FAR  # [size, 1]
            for buffer in memory.buffers[first:]:
                old = buffer[slot, part, :]
                buffer[slot, part, :] = jnp.where(column, old, jnp.zeros_like(old))

    jax.lax.fori_loop(0, tokens // size, piece, None)


def stacked(how: How, q: Array, sources: MixedSources, mask: Mask) -> Result:
    """(out, lse) of few queries over `Stacked` sources.

    Raises:
      NotImplementedError: too many queries, or a storage that would have to be turned.
    """
    both = _both(sources)
    size = both[0].shape[1]
    inputs.check_fits(q)
    inputs.check_lanes([x.data.shape[3] for x in both], "tokens", how)
    for x in both:
        chips.check_storage(how.chip, x.dtype)
    token_bytes = sum(x.data.shape[3] * x.dtype.itemsize for x in both)
    cut = inputs.BlockCut.of(size, token_bytes, 32 // min(x.dtype.itemsize for x in both))
    if cut.size != size and not how.interpret:
        # The compiler lays such a cache out with rows, not tokens, in its tiles, and would turn all
        # streams of it round for the kernel: those that are read, cut out, are less.
        raise NotImplementedError(
            f"a cache of {size} tokens has no whole tiles; use a multiple of {cut.align}"
        )

    def run(q: Array, mask: Mask) -> Result:
        return _blocks(how, q, sources, mask, cut)

    found = inputs.in_parts(run, q, mask, size, inputs.tokens_at_once(q.shape[2]))
    return inputs.with_tail(how, (q, sources, mask), cut, found)


def _both(sources: MixedSources) -> tuple[Stacked, ...]:
    return tuple(x for side in sources[:2] for x in side if isinstance(x, Stacked))


def _blocks(how: How, q: Array, sources: MixedSources, mask: Mask, cut: inputs.BlockCut) -> Result:
    """The kernel on the blocks of every row."""
    keys, values, key_weights, value_weights = sources
    both = _both(sources)
    batch, length, num, _ = q.shape
    size, heads = keys[0].shape[1:3]
    rule = Mask(causal=mask.causal, window=mask.window)
    places = inputs.StepPlaces.of(mask, length, size, cut)
    visited = places.visited(rule, cut.tokens)
    pad = inputs.padded_rows(length * num) - length * num
    own = np.arange(length * num) % num // (num // heads)
    own = own[:, None] == np.arange(heads)  # [T * N, K]
    arrays = dict(places.rows(num))
    arrays["scales"] = _scales(both, places.k_positions, cut)
    arrays["own"] = np.pad(own, ((0, pad), (0, 0))).astype(np.float32)
    queries = linear.fold_queries(q, key_weights, how.query_factor)  # [B, J, T, N, H]
    queries = queries.reshape(batch, len(keys), length * num, 1, -1).astype(q.dtype)
    queries = jnp.where(own[:, :, None], queries, jnp.zeros_like(queries))
    queries = queries.reshape(batch, 1, len(keys), length * num, -1)
    queries = jnp.pad(queries, ((0, 0),) * 3 + ((0, pad), (0, 0)))

    widths = [x.data.shape[3] for x in both]
    form = CacheReader(
        heads=1,
        rows=cut.tokens,
        chunk=cut.tokens,
        scores=tuple(Term(j, 0, widths[0]) for j in range(len(keys))),
        outputs=tuple(Term(len(keys) + j, 0, widths[-1]) for j in range(len(values))),
        buffers=tuple((cut.tokens, width) for width in widths),
        copy=functools.partial(_copy, cut=cut),
        read=_read,
        clear=functools.partial(_clear, tokens=cut.tokens, first=len(keys)),
    )
    slots = jnp.stack([jnp.asarray(x.slot, jnp.int32) for x in both])
    visited = jnp.broadcast_to(visited, (batch, visited.shape[1]))
    cache = Cache([x.data for x in both], visited, slots)
    out, lse = decode.run(how, rule, form, queries, cache, arrays)
    out = out[:, 0, :, : length * num].reshape(batch, len(values), length * num, heads, -1)
    out = jnp.where(own[:, :, None], out, 0.0).sum(3)
    out = linear.fold_outputs(out.reshape(batch, len(values), length, num, -1), value_weights)
    return out.astype(q.dtype), lse[:, 0, : length * num].reshape(batch, length, num)


def _scales(both: Sequence[Stacked], k_positions: Array, cut: inputs.BlockCut) -> Array | None:
    """Scales [B, terms, K, S'] where anything is stored in 8 bits; 0 * NaN is NaN."""
    if all(x.scale is None for x in both):
        return None
    found = []
    for x in both:
        batch, size, heads, _ = x.shape
        if x.scale is None:
            found.append(jnp.ones((batch, heads, size), jnp.float32))
            continue
        scale = jax.lax.dynamic_index_in_dim(x.scale, x.slot, keepdims=False)
        found.append(scale.astype(jnp.float32).swapaxes(1, 2))
    scales = cut.in_blocks(jnp.stack(found, axis=1), 0.0)
    return jnp.where(k_positions[:, None, None] < steps_lib.FAR, scales, 0.0)
