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

from pallas_kernels import linear, masks
from pallas_kernels.masks import Mask
from pallas_kernels.sources import MixedSources, Result
from pallas_kernels.stacked import Stacked
from pallas_kernels.tpu import chips, decode
from pallas_kernels.tpu import decode_inputs as inputs
from pallas_kernels.tpu import steps as steps_lib
from pallas_kernels.tpu.attend import How
from pallas_kernels.tpu.blocks import LANES, round_up
from pallas_kernels.tpu.decode import CacheReader, Memory, Method, Term
from pallas_kernels.tpu.how import Interpret

_TOKENS = 2048  # of a block at most: bounds the score tile


def _copy(
    method: Method,
    row: Array,
    block: Array,
    slot: int | Array,
    memory: Memory,
    *,
    tokens: int,
    size: int,
    tile: int,
) -> None:
    start = pl.multiple_of(_start(block, tokens, size), tile)
    for index, (stored, buffer) in enumerate(zip(memory.stored, memory.buffers, strict=True)):
        source = stored.at[memory.table[index], row, pl.ds(start, tokens)]
        getattr(pltpu.make_async_copy(source, buffer.at[slot], memory.sems.at[slot]), method)()


def _start(block: Array, tokens: int, size: int) -> Array:
    """The first token of a block; the last block overlaps the one before it."""
    return jnp.minimum(block * tokens, size - tokens)


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


def block_tokens(sources: Sequence[Stacked], size: int, interpret: Interpret) -> tuple[int, int]:
    """(tokens of a block, tokens that every copy begins at a multiple of).

    Raises:
      NotImplementedError: the last of several blocks would begin within a tile of memory.
    """
    token_bytes = sum(x.data.shape[3] * x.dtype.itemsize for x in sources)
    tokens = inputs.BLOCK_BYTES // token_bytes // LANES * LANES
    tokens = max(LANES, min(tokens, _TOKENS))
    tile = 32 // min(x.dtype.itemsize for x in sources)
    if size <= tokens:
        return size, 1
    if size % tile and not interpret:
        raise NotImplementedError(
            f"a cache of {size} tokens has no whole tiles; use a multiple of {tile}"
        )
    return tokens, 1 if size % tile else tile


def stacked(how: How, interpret: Interpret, q: Array, sources: MixedSources, mask: Mask) -> Result:
    """(out, lse) of few queries over `Stacked` sources.

    Raises:
      NotImplementedError: too many queries, segments, or a storage that would have to be turned.
    """
    keys, values, key_weights, value_weights = sources
    both = tuple(x for x in (*keys, *values) if isinstance(x, Stacked))
    batch, length, num, _ = q.shape
    size, heads = keys[0].shape[1:3]
    if length * num > inputs.MAX_ROWS:
        raise NotImplementedError(f"{length} x {num} query rows; decoding takes {inputs.MAX_ROWS}")
    if mask.q_segment_ids is not None:
        raise NotImplementedError("decoding knows no segments")
    inputs.check_lanes([x.data.shape[3] for x in both], "tokens", interpret)
    for x in both:
        chips.check_storage(how.chip, x.dtype)
    tokens, tile = block_tokens(both, size, interpret)

    rule = Mask(causal=mask.causal, window=mask.window)
    q_positions = jnp.asarray(masks.query_positions(mask, length, size)).astype(jnp.int32)
    k_positions = masks.key_positions(mask, size)
    k_positions = jnp.where(k_positions < 0, steps_lib.FAR, k_positions).astype(jnp.int32)
    k_positions = _in_blocks(k_positions, tokens, steps_lib.FAR)
    visited = inputs.visited_blocks(rule, q_positions, k_positions, tokens)
    pad = round_up(length * num, 16) - length * num
    own = np.arange(length * num) % num // (num // heads)
    own = own[:, None] == np.arange(heads)  # [T * N, K]
    rows = jnp.repeat(q_positions, num, axis=1)
    arrays = {
        "q_positions": jnp.pad(rows, ((0, 0), (0, pad)), constant_values=-steps_lib.FAR),
        "q_heads": None,
        "k_positions": k_positions[:, None],
        "k_heads": None,
        "scales": _scales(both, k_positions, tokens),
        "own": np.pad(own, ((0, pad), (0, 0))).astype(np.float32),
    }
    queries = linear.fold_queries(q, key_weights, how.query_factor)  # [B, J, T, N, H]
    queries = queries.reshape(batch, len(keys), length * num, 1, -1).astype(q.dtype)
    queries = jnp.where(own[:, :, None], queries, jnp.zeros_like(queries))
    queries = queries.reshape(batch, 1, len(keys), length * num, -1)
    queries = jnp.pad(queries, ((0, 0),) * 3 + ((0, pad), (0, 0)))

    width = lambda side: side[0].data.shape[3]  # noqa: E731
    form = CacheReader(
        heads=1,
        rows=tokens,
        chunk=tokens,
        scores=tuple(Term(j, 0, width(keys)) for j in range(len(keys))),
        outputs=tuple(Term(len(keys) + j, 0, width(values)) for j in range(len(values))),
        buffers=tuple((tokens, x.data.shape[3]) for x in both),
        copy=functools.partial(_copy, tokens=tokens, size=size, tile=tile),
        read=_read,
        clear=functools.partial(_clear, tokens=tokens, first=len(keys)),
    )
    slots = jnp.stack([jnp.asarray(x.slot, jnp.int32) for x in both])
    none = jnp.zeros(1, jnp.int32)
    data = [x.data for x in both]
    visited = jnp.broadcast_to(visited, (batch, visited.shape[1]))
    out, lse = decode.run(how, rule, form, queries, data, slots, none, visited, arrays, interpret)
    out = out[:, 0, :, : length * num].reshape(batch, len(values), length * num, heads, -1)
    out = jnp.where(own[:, :, None], out, 0.0).sum(3)
    out = linear.fold_outputs(out.reshape(batch, len(values), length, num, -1), value_weights)
    return out.astype(q.dtype), lse[:, 0, : length * num].reshape(batch, length, num)


def _in_blocks(x: Array, tokens: int, absent: int | float) -> Array:
    """[..., S] as the blocks are copied: those tokens of the last that came before are absent."""
    size = x.shape[-1]
    late = size % tokens
    if not late:
        return x
    fresh = np.arange(tokens) >= tokens - late
    last = jnp.where(fresh, x[..., size - tokens :], absent)
    return jnp.concatenate([x[..., : size - late], last], axis=-1)


def _scales(both: Sequence[Stacked], k_positions: Array, tokens: int) -> Array | None:
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
    scales = _in_blocks(jnp.stack(found, axis=1), tokens, 0.0)
    return jnp.where(k_positions[:, None, None] < steps_lib.FAR, scales, 0.0)
