"""Queries of many rows side by side: whose they are, where they stand, and how they are cut."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


class RowBlocks(NamedTuple):
    """Blocks of consecutive queries of one row each; what is not used has no queries.

    Attributes:
      rows: int32 [I], the row of each block.
      starts: int32 [I], place of its first query among all.
      counts: int32 [I], its queries; 0 for a block that is not used.
      positions: int32 [I], position of its first query.
      firsts: int32 [R + 1], number of each row's first block; last, how many are used.
    """

    rows: Array
    starts: Array
    counts: Array
    positions: Array
    firsts: Array


@dataclasses.dataclass(frozen=True)
class RaggedRows:
    """A step that mixes chunks of prompts and single tokens: the queries of R rows among T.

    Query i of row r has place starts[r] + i among all queries, and stands at position
    lengths[r] - counts[r] + i of its row. No two rows share a place; places of no row, such as
    padding, may be anywhere.

    Attributes:
      starts: int32 [R], place of each row's first query.
      counts: int32 [R], queries of each row; 0 for none.
      lengths: int32 [R], tokens of each row, those of its queries included.
      lanes: ((rows, columns), ...) where rows lie one after another in lanes, with so many places
        for the queries of each; () where they may lie anywhere. Only a hint: XLA, whose shapes
        cannot depend on the counts, attends lane by lane.
    """

    # Any, as jax also fills trees with tracers, shapes and placeholders.
    starts: Any
    counts: Any
    lengths: Any
    lanes: tuple[tuple[int, int], ...] = ()

    @classmethod
    def in_lanes(
        cls,
        lanes: tuple[tuple[int, int], ...],
        counts: Int[Array, "R"],
        lengths: Int[Array, "R"],
    ) -> "RaggedRows":
        """Rows whose places are those of the lanes."""
        columns = np.repeat([x for _, x in lanes], [x for x, _ in lanes])
        starts = np.concatenate([[0], np.cumsum(columns)[:-1]])
        return cls(jnp.asarray(starts, jnp.int32), counts, lengths, lanes)

    def owners(self, total: int) -> tuple[Int[Array, "T"], Int[Array, "T"]]:
        """Row of each of all T queries, -1 for none, and which of the row's queries it is."""
        there = self.counts > 0
        rows = jnp.arange(self.counts.shape[0], dtype=jnp.int32)
        marks = jnp.full(total, -1, jnp.int32)
        marks = marks.at[jnp.where(there, self.starts, total)].set(rows, mode="drop")
        places = jnp.arange(total, dtype=jnp.int32)
        begun = jax.lax.cummax(jnp.where(marks >= 0, places, -1))
        row, index = marks[jnp.maximum(begun, 0)], places - begun
        inside = (begun >= 0) & (index < self.counts[row])
        return jnp.where(inside, row, -1), index

    def blocks(self, total: int, size: int) -> RowBlocks:
        """The queries of every row in blocks of at most `size`, row after row."""
        num_rows = self.counts.shape[0]
        each = -(-self.counts // size)
        firsts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(each, dtype=jnp.int32)])
        index = jnp.arange(min(total, total // size + num_rows), dtype=jnp.int32)
        row = jnp.searchsorted(firsts[1:], index, side="right", method="compare_all")
        used = index < firsts[-1]
        row = jnp.minimum(row, num_rows - 1).astype(jnp.int32)
        done = (index - firsts[row]) * size
        counts = jnp.where(used, jnp.minimum(self.counts[row] - done, size), 0)
        positions = self.lengths[row] - self.counts[row] + done
        return RowBlocks(row, self.starts[row] + done, counts, positions, firsts)


jax.tree_util.register_dataclass(RaggedRows, ["starts", "counts", "lengths"], ["lanes"])
