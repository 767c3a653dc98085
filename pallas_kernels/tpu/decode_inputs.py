"""What decoding from any form of a cache needs: its cut, which blocks to visit, its limits."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import masks, xla
from pallas_kernels.call import AttentionCall
from pallas_kernels.combining import combine
from pallas_kernels.masks import Mask
from pallas_kernels.sources import MixedSources, Result, Source
from pallas_kernels.tpu import steps as steps_lib
from pallas_kernels.tpu.blocks import LANES, round_up
from pallas_kernels.tpu.how import How

BLOCK_BYTES = 4 * 2**20  # of a block: some microseconds of copying, against the cost of a step
BLOCK_TOKENS = 2048  # of a block at most: bounds the score tile
MAX_ROWS = 256  # query rows of one product
# Parts of the queries, each of which reads the cache: turning it round costs about as much as four.
PARTS = 4


def tokens_at_once(rows: int) -> int:
    """Tokens of `rows` query rows each that one product takes."""
    return max(1, MAX_ROWS // rows)


def fits(q: Array) -> bool:
    """Whether queries [B, T, N, H] are few enough to read a cache in place."""
    length, num = q.shape[1:3]
    return length <= PARTS * tokens_at_once(num)


def check_fits(q: Array) -> None:
    """Raises NotImplementedError unless `fits`."""
    length, num = q.shape[1:3]
    if not fits(q):
        raise NotImplementedError(f"{length} x {num} query rows; decoding takes {PARTS * MAX_ROWS}")


def in_parts(
    run: Callable[[Array, Mask], Result], q: Array, mask: Mask, num_keys: int, step: int
) -> Result:
    """`run` for `step` tokens of the queries [B, T, N, H] at a time."""
    length = q.shape[1]
    if length <= step:
        return run(q, mask)
    positions = jnp.asarray(masks.query_positions(mask, length, num_keys))
    positions = jnp.broadcast_to(positions, q.shape[:2])
    found = []
    for start in range(0, length, step):
        cut = slice(start, start + step)
        segments = None if mask.q_segment_ids is None else mask.q_segment_ids[:, cut]
        part = dataclasses.replace(mask, q_positions=positions[:, cut], q_segment_ids=segments)
        found.append(run(q[:, cut], part))
    outs, lses = zip(*found, strict=True)
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)


@dataclasses.dataclass(frozen=True)
class BlockCut:
    """How the tokens of a row are cut into blocks.

    Attributes:
      size: tokens that blocks cover, the first of a row; a few others are a tail.
      tokens: of a block.
      align: every copy begins at a multiple of this.
    """

    size: int
    tokens: int
    align: int

    @classmethod
    def of(cls, size: int, token_bytes: int, align: int) -> "BlockCut":
        """Blocks of `BLOCK_BYTES`, in whole lanes unless one holds all."""
        tokens = min(BLOCK_BYTES // token_bytes // LANES * LANES, BLOCK_TOKENS)
        tokens = max(LANES, tokens)
        if size <= tokens:
            return cls(size, size, 1)
        return cls(size - size % align, tokens, align)

    def start(self, block: Array) -> Array:
        """The first token of a block; the last block overlaps the one before it."""
        return jnp.minimum(block * self.tokens, self.size - self.tokens)

    def in_blocks(self, x: Array, absent: int | float) -> Array:
        """[..., S] as the blocks are copied: tokens of the last that came before are absent."""
        x = x[..., : self.size]
        late = self.size % self.tokens
        if not late:
            return x
        fresh = np.arange(self.tokens) >= self.tokens - late
        last = jnp.where(fresh, x[..., self.size - self.tokens :], absent)
        return jnp.concatenate([x[..., : self.size - late], last], axis=-1)


def with_tail(
    how: How, call: tuple[Array, MixedSources, Mask], cut: BlockCut, found: Result
) -> Result:
    """What blocks have found, merged with what XLA finds in the few tokens after them.

    A copy moves whole tiles of memory. The rest of a length that is no multiple of them, fewer than
    32 tokens, would be read beyond the array's end, and is cut out instead.
    """
    q, sources, mask = call
    length, size = q.shape[1], sources.keys[0].shape[1]
    if cut.size == size:
        return found
    late = slice(cut.size, None)
    rest = Mask(
        causal=mask.causal,
        window=mask.window,
        q_positions=jnp.asarray(masks.query_positions(mask, length, size)),
        kv_positions=jnp.asarray(masks.key_positions(mask, size)[:, late]),
        q_segment_ids=mask.q_segment_ids,
        kv_segment_ids=None if mask.kv_segment_ids is None else mask.kv_segment_ids[:, late],
    )

    def end(source: Source) -> Source:
        if isinstance(source, Array):
            return source[:, late]
        return source.tokens(cut.size, size - cut.size)

    keys, values = (tuple(map(end, side)) for side in sources[:2])
    sources = sources._replace(keys=keys, values=values)
    tail = xla.attention(
        AttentionCall(q=q, sources=sources, mask=rest, scale=how.scale, softcap=how.softcap)
    )
    return combine([found, tail])


@dataclasses.dataclass(frozen=True)
class StepPlaces:
    """Integers of a decoding step, those of keys in the order of blocks.

    Attributes:
      q_positions: [B or 1, T].
      k_positions: [B or 1, S'], FAR where a key is absent.
      q_segments, k_segments: alike, or None; padding has -1 and -2, so that it never matches.
    """

    q_positions: Array
    k_positions: Array
    q_segments: Array | None
    k_segments: Array | None

    @classmethod
    def of(cls, mask: Mask, num_queries: int, num_keys: int, cut: BlockCut) -> "StepPlaces":
        """The integers of `mask`."""
        keys = masks.key_positions(mask, num_keys)
        keys = jnp.where(keys < 0, steps_lib.FAR, keys).astype(jnp.int32)
        queries = jnp.asarray(masks.query_positions(mask, num_queries, num_keys))
        q_segments, k_segments = mask.q_segment_ids, mask.kv_segment_ids
        if q_segments is not None:
            q_segments = jnp.where(q_segments < 0, -1, q_segments)
            k_segments = cut.in_blocks(jnp.where(k_segments < 0, -2, k_segments), -2)
        k_positions = cut.in_blocks(keys, steps_lib.FAR)
        return cls(queries.astype(jnp.int32), k_positions, q_segments, k_segments)

    def visited(self, rule: Mask, block: int) -> Array:
        """bool [B or 1, blocks] of tiles that may hold something visible."""
        where = steps_lib.BlockedPlaces(
            self.q_positions, self.k_positions, self.q_segments, self.k_segments, False
        )
        visited, _ = steps_lib.tables(rule, where, self.q_positions.shape[1], block)
        return jnp.asarray(visited[:, 0])

    def rows(self, heads: int, repeat: int = 1) -> Mapping[str, Any]:
        """What the kernel reads: each token's integers for `heads` query rows, padded to whole
        tiles of rows, and for `repeat` rows of stored keys."""
        pad = -self.q_positions.shape[1] * heads % 16

        def query(x: Array | None, fill: int) -> Array | None:
            if x is None:
                return None
            x = jnp.repeat(x, heads, axis=1)
            return jnp.pad(x, ((0, 0), (0, pad)), constant_values=fill)

        def key(x: Array | None) -> Array | None:
            return None if x is None else jnp.repeat(x, repeat, axis=1)[:, None]

        return {
            "q_positions": query(self.q_positions, -steps_lib.FAR),
            "q_segments": query(self.q_segments, -1),
            "k_positions": key(self.k_positions),
            "k_segments": key(self.k_segments),
        }


def padded_rows(rows: int) -> int:
    """Query rows in whole tiles."""
    return round_up(rows, 16)


def check_lanes(widths: Iterable[int], what: str, how: How) -> None:
    """Refuses a cache that the compiler would copy at every step.

    It lays out arrays with a narrow last axis with another one in the lanes, and turns them
    round for a kernel.
    """
    narrow = [width for width in widths if width % LANES]
    if narrow and not how.interpret:
        raise NotImplementedError(
            f"decoding reads {what} of a multiple of {LANES} channels in place; these have "
            f"{narrow[0]}"
        )
