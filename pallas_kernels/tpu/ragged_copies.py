"""What the ragged kernel copies: a list of work, queries and results, pages of keys and values.

    queries   a block of a piece's units, while the piece before it is computed
    keys      pages of a block of keys that hold any of a piece, of all streams, and their scales
    results   unit by unit, while the next piece is computed

What is absent from a block that has arrived is zeroed: its memory may hold NaN, and 0 * NaN is NaN.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.blocks import LANES
from pallas_kernels.tpu.how import How
from pallas_kernels.tpu.ragged_inputs import FIELDS, RaggedForm


class Static(NamedTuple):
    """Static settings: sizes, pages of a block of keys, tokens of a page, entries of a table."""

    how: How
    form: RaggedForm
    window: int | None
    pages: int
    page_size: int
    width: int

    @property
    def scale_rows(self) -> int:
        """Rows of scales of a page, each of at most a lane of tokens for every head."""
        return max(1, self.page_size // LANES)

    @property
    def scale_tokens(self) -> int:
        """Tokens of such a row."""
        return self.page_size // self.scale_rows

    @property
    def tokens(self) -> int:
        """Tokens of a block of keys."""
        return self.pages * self.page_size


class Piece(NamedTuple):
    """Scalars of a piece of work; see `inputs.work_list`."""

    row: Any
    unit: Any
    queries: Any
    position: Any
    low: Any
    high: Any

    @classmethod
    def of(cls, numbers: Ref, index: Any) -> "Piece":
        return cls(*(numbers[index * len(FIELDS) + n] for n in range(len(FIELDS))))


class Memory(NamedTuple):
    """References of the kernel.

    Attributes:
      numbers, bounds, table, slots: the list of work, where each core's part of it begins, pages of
        all rows, slot of each stream.
      tokens, weights: token of each row of queries; weights of the values.
      places, scale_tokens, owners: of 8-bit pages, see `inputs.scale_places`.
      queries, stored, scales, out, lse: in HBM; no scales, and no lse, where there are none.
      block, block_lse: results of a piece in VMEM.
      q, buffers, scale_buffers: in VMEM, each twice, one to be filled.
      q_sems, sems, out_sem: of copies.
      top, total, acc: sums.
      turn: which of the buffers holds the block of keys at work.
    """

    numbers: Any
    bounds: Any
    table: Any
    slots: Any
    tokens: Any
    weights: Any
    places: Any
    scale_tokens: Any
    owners: Any
    queries: Any
    stored: Any
    scales: Any
    out: Any
    lse: Any
    block: Any
    block_lse: Any
    q: Any
    buffers: Any
    scale_buffers: Any
    q_sems: Any
    sems: Any
    out_sem: Any
    top: Any
    total: Any
    acc: Any
    turn: Any


Method = Literal["start", "wait"]


def by_size(small: Any, sizes: Sequence[int], run: Any) -> None:
    """`run` for one unit of queries, or for a whole block of them."""
    if len(sizes) == 1:
        run(sizes[0])
        return
    pl.when(small)(functools.partial(run, sizes[0]))
    pl.when(~small)(functools.partial(run, sizes[1]))


def ceil(number: Array, divisor: int) -> Array:
    """Of numbers that are not negative, rounded up; `//` would ask for their sign."""
    return jax.lax.div(number + divisor - 1, divisor)


def queries(static: Static, memory: Memory, piece: Piece, slot: Any, method: Method) -> None:
    """The copy of a piece's queries: a block of them, though it may go on in another row's."""

    def copy(units: int) -> None:
        source = memory.queries.at[pl.ds(piece.unit, units)]
        target = memory.q.at[slot, pl.ds(0, units)]
        getattr(pltpu.make_async_copy(source, target, memory.q_sems.at[slot]), method)()

    by_size(piece.queries <= static.form.tokens, sorted({1, static.form.units}), copy)


def results(static: Static, memory: Memory, piece: Piece, method: Method) -> None:
    """The copies of a piece's results, unit by unit."""

    def unit(number: Array, _: None) -> None:
        for source, target in ((memory.block, memory.out), (memory.block_lse, memory.lse)):
            if target is not None:
                copy = pltpu.make_async_copy(
                    source.at[number], target.at[piece.unit + number], memory.out_sem
                )
                getattr(copy, method)()

    jax.lax.fori_loop(0, ceil(piece.queries, static.form.tokens), unit, None)


def keys(
    static: Static, memory: Memory, piece: Piece, block: Any, slot: Any, method: Method
) -> None:
    """The copies of the pages of a block that hold keys of a piece, of all streams."""
    size = static.page_size

    def page(index: Array, _: None) -> None:
        number = block * static.pages + index

        @pl.when((number * size < piece.high) & ((number + 1) * size > piece.low))
        def _() -> None:
            at = memory.table[piece.row * static.width + number]

            def copy(source: Any, target: Any) -> None:
                getattr(pltpu.make_async_copy(source, target, memory.sems.at[slot]), method)()

            for stream, stored in enumerate(memory.stored):
                copy(stored.at[memory.slots[stream], at], memory.buffers[stream].at[slot, index])
            for stream, scales in enumerate(memory.scales):
                buffer, rows = memory.scale_buffers[stream], static.scale_rows
                lanes = buffer.shape[3]
                for row in range(rows):
                    part = pl.ds(row * lanes, lanes)
                    copy(
                        scales.at[memory.slots[stream], at, :, part],
                        buffer.at[slot, index * rows + row],
                    )

    jax.lax.fori_loop(0, static.pages, page, None)


def clear(static: Static, memory: Memory, piece: Piece, block: Any, slot: Any) -> None:
    """Zeroes absent values, and scales; scores of absent keys are masked anyway."""
    size, rows = static.page_size, static.scale_rows

    def page(index: Array, _: None) -> None:
        start = (block * static.pages + index) * size

        @pl.when((start < piece.low) | (start + size > piece.high))
        def _() -> None:
            for buffer in memory.buffers[static.form.num_keys :]:
                old = buffer[slot, index]
                token = start + jax.lax.broadcasted_iota(jnp.int32, old.shape, old.ndim - 2)
                if old.ndim == 3:  # tiles of tokens
                    token += old.shape[1] * jax.lax.broadcasted_iota(jnp.int32, old.shape, 0)
                there = (token >= piece.low) & (token < piece.high)
                buffer[slot, index] = jnp.where(there, old, jnp.zeros_like(old))
            for buffer in memory.scale_buffers:
                old = buffer[slot, pl.ds(index * rows, rows)]  # [rows, 1, heads * tokens]
                row = jax.lax.broadcasted_iota(jnp.int32, old.shape, 0)
                token = start + row * LANES + memory.scale_tokens[...]
                there = (token >= piece.low) & (token < piece.high)
                buffer[slot, pl.ds(index * rows, rows)] = jnp.where(there, old, 0.0)

    jax.lax.fori_loop(0, static.pages, page, None)
