"""Decoding from contiguous arrays [B, S, K, H], with scales if they are stored in 8 bits."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import linear, masks
from pallas_kernels.devices import Chip
from pallas_kernels.masks import Mask
from pallas_kernels.quantized import Quantized
from pallas_kernels.sources import MixedSources, Result, Source, as_array
from pallas_kernels.tpu import chips, decode
from pallas_kernels.tpu import decode_inputs as inputs
from pallas_kernels.tpu import steps as steps_lib
from pallas_kernels.tpu.attend import How
from pallas_kernels.tpu.blocks import LANES, round_up
from pallas_kernels.tpu.decode import CacheReader, Memory, Method, Term
from pallas_kernels.tpu.how import Interpret

_CHUNK = 2048  # rows that are multiplied at once: bounds the score tile


def _contiguous_copy(
    method: Method, row: Array, block: Array, slot: int | Array, memory: Memory, *, rows: int
) -> None:
    start = pl.multiple_of(block * rows, rows)
    for stored, buffer in zip(memory.stored, memory.buffers, strict=True):
        source = stored.at[row, pl.ds(start, rows)]
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


def _block_tokens(length: int, heads: int, token_bytes: int) -> int:
    """Tokens of a block: a divisor of the length."""
    if length * token_bytes <= inputs.BLOCK_BYTES:
        return length
    tokens = 2048
    while tokens > 1 and (tokens * token_bytes > inputs.BLOCK_BYTES or length % tokens):
        tokens //= 2
    if tokens * heads % LANES or tokens * token_bytes < inputs.BLOCK_BYTES // 64:
        raise NotImplementedError(
            f"a cache of {length} tokens is not a whole number of blocks; use a multiple of 128"
        )
    return tokens


def contiguous(
    how: How, interpret: Interpret, q: Array, sources: MixedSources, mask: Mask
) -> Result:
    """(out, lse) of few queries over sources [B, S, K, H], arrays or `Quantized`."""
    keys, values, key_weights, value_weights = sources
    batch, length, num, _ = q.shape
    size, heads = keys[0].shape[1:3]
    if length * num > inputs.MAX_ROWS:
        raise NotImplementedError(f"{length} x {num} query rows; decoding takes {inputs.MAX_ROWS}")
    if mask.q_segment_ids is not None:
        raise NotImplementedError("decoding knows no segments")
    both = (*keys, *values)
    stored, scales = _storage(both, how.chip)
    tokens = _block_tokens(size, heads, sum(x[0, 0].size * x.dtype.itemsize for x in stored))
    block = tokens * heads
    chunk = next(c for c in range(min(block, _CHUNK), 0, -1) if block % c == 0)
    if chunk % LANES:
        chunk = block
    # [S * K, H] is the same memory as [S, K, H].
    flat = [x.reshape(batch, size * heads, x.shape[3]) for x in stored]

    rule = Mask(causal=mask.causal, window=mask.window)
    q_positions = jnp.asarray(masks.query_positions(mask, length, size)).astype(jnp.int32)
    k_positions = masks.key_positions(mask, size)
    k_positions = jnp.where(k_positions < 0, steps_lib.FAR, k_positions).astype(jnp.int32)
    visited = inputs.visited_blocks(rule, q_positions, k_positions, tokens)
    visited = jnp.broadcast_to(visited, (batch, visited.shape[1]))
    pad = round_up(length * num, 16) - length * num
    rows = lambda x: jnp.pad(x, ((0, 0), (0, pad)), constant_values=-steps_lib.FAR)  # noqa: E731
    arrays = {
        "q_positions": rows(jnp.repeat(q_positions, num, axis=1)),
        "q_heads": None,
        "k_positions": jnp.repeat(k_positions, heads, axis=1)[:, None],
        "k_heads": None,
        "scales": None,
    }
    if heads > 1:
        own = np.arange(length * num, dtype=np.int32)[None] % num // (num // heads)
        arrays["q_heads"] = rows(jnp.asarray(own))
        arrays["k_heads"] = jnp.asarray(np.arange(block, dtype=np.int32) % heads)[None, None]
    if scales is not None:
        arrays["scales"] = jnp.stack([x.reshape(batch, size * heads) for x in scales], axis=1)[
            :, None
        ].astype(jnp.float32)
        there = arrays["k_positions"][:, None] < steps_lib.FAR
        arrays["scales"] = jnp.where(there, arrays["scales"], 0.0)  # 0 * NaN is NaN

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
        copy=functools.partial(_contiguous_copy, rows=block),
        read=_contiguous_read,
        clear=_contiguous_clear,
    )
    none = jnp.zeros(1, jnp.int32)
    out, lse = decode.run(how, rule, form, queries, flat, none, none, visited, arrays, interpret)
    out = out[:, 0, :, : length * num].reshape(batch, len(values), length, num, -1)
    out = linear.fold_outputs(out, value_weights).astype(q.dtype)
    return out, lse[:, 0, : length * num].reshape(batch, length, num)


def _storage(sources: Sequence[Source], chip: Chip) -> tuple[list[Array], list[Array] | None]:
    """The stored arrays and, if any is quantized, a [B, S, K, 1] scale for each."""
    if not any(isinstance(x, Quantized) for x in sources):
        return [as_array(x) for x in sources], None
    stored, scales = [], []
    for x in sources:
        if isinstance(x, Quantized):
            if not x.per_token or x.bits != 8:
                raise NotImplementedError("only 8-bit caches with one scale per token and head")
            chips.check_storage(chip, x.data.dtype)
            stored.append(x.data)
            scales.append(x.scale)
        else:
            stored.append(as_array(x))
            scales.append(jnp.ones((*x.shape[:3], 1), jnp.float32))
    return stored, scales
