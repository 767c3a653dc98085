"""Which tiles a kernel visits, in which order: one packed integer per step of its grid.

Worked example, causal, two blocks of queries (rows) and of keys (columns):

    x .      query-major: (0,0) first last, (1,0) first, (1,1) last
    x x      key-major:   (0,0) first, (0,1) last, (1,1) first last

Diagonal tiles are MASKED, the other is not. A row without any visible tile still gets one step,
without WORK, which writes its zeros.
"""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import masks
from pallas_kernels.masks import Mask

Table = Array | np.ndarray  # NumPy where it is known while tracing
Step = Array | np.ndarray | np.integer  # one of the grid, or several

FIRST, LAST, WORK, MASKED = 1, 2, 4, 8
_INNER, _OUTER = 4, 18  # bit offsets: 4 flags, 14 bits of the inner block, 13 of the outer
LIMIT = 2**13  # blocks per side
SMEM = 960 * 2**10  # bytes of lists and tables in the 1 MiB of scalar memory; the compiler has some
FAR = 2**30  # beyond every position
_NONE = 2**31 - 1  # a step that sorts behind all others


@dataclasses.dataclass(frozen=True)
class BlockedPlaces:
    """Integers of a call, padded to whole blocks; leading dimension B, or 1 if all rows agree.

    Attributes:
      q_positions, k_positions: absent keys have position FAR, which no query reaches.
      q_segments, k_segments: or both None; padding has -1 and -2, so that it never matches.
      holes: some keys of the arrays themselves may be absent.
    """

    q_positions: Any
    k_positions: Any
    q_segments: Any
    k_segments: Any
    holes: bool


def _module(x: Table) -> ModuleType:
    """NumPy for what is known while tracing, else jax.numpy."""
    return np if isinstance(x, np.ndarray) else jnp


def _pad(x: Table, size: int, value: int) -> Table:
    xp = _module(x)
    return xp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=value)


def places(
    mask: Mask, num_queries: int, num_keys: int, block_q: int, block_k: int
) -> BlockedPlaces:
    """The integers of `mask` for blocks of these sizes; NumPy where known while tracing."""
    q_positions = masks.query_positions(mask, num_queries, num_keys)
    k_positions = masks.key_positions(mask, num_keys)
    xp = _module(k_positions)
    k_positions = xp.where(k_positions < 0, FAR, k_positions).astype(np.int32)
    q_segments, k_segments = mask.q_segment_ids, mask.kv_segment_ids
    if q_segments is not None:
        q_segments = _pad(jnp.where(q_segments < 0, -1, q_segments), block_q, -1)
        k_segments = _pad(jnp.where(k_segments < 0, -2, k_segments), block_k, -2)
    return BlockedPlaces(
        _pad(q_positions.astype(np.int32), block_q, -FAR),
        _pad(k_positions, block_k, FAR),
        q_segments,
        k_segments,
        mask.ragged,
    )


def queries(where: BlockedPlaces, cut: slice) -> BlockedPlaces:
    """The places of some of the queries."""
    part = lambda x: None if x is None else x[:, cut]  # noqa: E731
    return dataclasses.replace(
        where, q_positions=part(where.q_positions), q_segments=part(where.q_segments)
    )


def visible(
    mask: Mask,
    q_positions: Table,
    k_positions: Table,
    q_segments: Table | None,
    k_segments: Table | None,
) -> Table:
    """The rule for a tile whose integers broadcast against each other."""
    limit = q_positions if mask.causal else FAR - 1
    seen = k_positions <= limit
    if mask.window is not None:
        seen = seen & (q_positions - k_positions < mask.window)
    if q_segments is not None:
        seen = seen & (q_segments == k_segments)
    return seen


def tables(mask: Mask, where: BlockedPlaces, block_q: int, block_k: int) -> tuple[Table, Table]:
    """(visited, full), bool [R, query blocks, key blocks]: tiles with anything, or nothing hidden.

    Decided by the extremes of each block: a visited tile may be empty, a dropped one always is.
    """

    def extremes(x: Table, block: int, absent: Callable[[Table], Table], axis: int) -> list[Table]:
        xp = _module(x)
        x = x.reshape(x.shape[0], -1, block)
        low, high = x.min(2), x.max(2)
        there = xp.where(absent(x), -FAR, x).max(2)
        return [xp.expand_dims(y, axis) for y in (low, high, there)]

    q_low, q_high, _ = extremes(where.q_positions, block_q, lambda x: x <= -FAR, 2)
    k_low, k_high, k_last = extremes(where.k_positions, block_k, lambda x: x >= FAR, 1)
    q_first = -extremes(-where.q_positions, block_q, lambda x: x >= FAR, 2)[2]
    visited = k_low < FAR
    full = k_high < FAR
    if mask.causal:
        visited = visited & (k_low <= q_high)
        full = full & (k_high <= q_low)
    if mask.window is not None:
        visited = visited & (q_first - k_last < mask.window)
        full = full & (q_high - k_low < mask.window)
    visited, full = visited & (q_high > -FAR), full & (q_high > -FAR)
    if where.q_segments is not None:
        q_low, q_high, _ = extremes(where.q_segments, block_q, lambda x: x < 0, 2)
        k_low, k_high, _ = extremes(where.k_segments, block_k, lambda x: x < 0, 1)
        visited = visited & ((k_low <= q_high) & (q_low <= k_high))
        full = full & ((k_low == q_high) & (q_low == k_high) & (q_low == q_high))
    return visited, full & visited


def shared(visited: Array, parts: int) -> Array:
    """bool [parts, outer, inner]: the tiles of a table cut into parts of as many, in order."""
    number = jnp.cumsum(visited.ravel())
    part = (number - 1) * parts // jnp.maximum(number[-1], 1)
    return visited & (part.reshape(visited.shape) == jnp.arange(parts)[:, None, None])


def listed(visited: Table, full: Table, idle: bool = True) -> tuple[Array, int, int | Array]:
    """(steps [R * length] int32, length, count) of the tables [R, outer, inner], in order.

    Without `idle`, outer blocks that nothing is visited of have no step, and write nothing.

    `count` steps are to be run: the length itself if the tables are known while tracing, else
    a traced number. Steps of a row beyond its own end repeat its last one without work.

    Raises:
      NotImplementedError: more blocks than a step can name, or steps than scalar memory holds.
    """
    xp = _module(visited)
    rows, outer, inner = visited.shape
    if max(outer, inner) > LIMIT:
        raise NotImplementedError(f"{max(outer, inner)} blocks; at most {LIMIT} are served")
    at, row = np.arange(inner, dtype=np.int32), np.arange(outer, dtype=np.int32)[:, None]
    first = xp.where(visited, at, inner).min(2, keepdims=True)
    last = xp.where(visited, at, 0).max(2, keepdims=True)
    if idle:
        first = xp.where(first == inner, 0, first)
    shown = visited | (at == first)
    flags = FIRST * (at == first) + LAST * (at == last)
    flags = flags + xp.where(visited, WORK, 0) + xp.where(visited & ~full, MASKED, 0)
    code = (row << _OUTER) + (at << _INNER) + flags
    # Codes grow from tile to tile: sorted they are in order, with what is no step at the end.
    order = xp.where(shown, code, _NONE)
    if xp is np:
        order = np.sort(order.reshape(rows, -1), axis=1)
    else:
        # A layer of decoding makes its own table, and each operation costs it about a microsecond,
        # however small. Without the barrier XLA reshapes every operand instead of the result.
        order = jax.lax.sort(jax.lax.optimization_barrier(order).reshape(rows, -1), is_stable=False)
    count = shown.sum((1, 2)).max().astype(np.int32)
    length = int(count) if xp is np else outer * inner
    if 4 * rows * length > SMEM:
        raise NotImplementedError(
            f"{rows * length} steps of the grid, of which scalar memory holds {SMEM // 4}; use a "
            f"smaller batch"
        )
    beyond = xp.where(shown, code & ~15, 0).max((1, 2))[:, None]
    steps = xp.where(order == _NONE, beyond, order)[:, :length]
    steps = jnp.asarray(steps.reshape(-1).astype(np.int32))
    return steps, length, length if xp is np else count


def outer_block(step: Step) -> Step:
    """The query block of a query-major step, the key block of a key-major one."""
    return step >> _OUTER


def inner_block(step: Step) -> Step:
    """The other block."""
    return (step >> _INNER) & (2 ** (_OUTER - _INNER) - 1)
