"""Shapes of a step: few, so that all of them are compiled before the first request."""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class StepShapes:
    """Sizes that the arrays of a step are rounded up to.

    A step has two lanes: rows of one token (decodes), and rows of `chunk` tokens, of which a long
    chunk of a prompt takes several. There are as many rows for the upper layers as in the first.

    Attributes:
        decode_rows: of the first lane in steps without chunks, ascending.
        mixed_rows: of the first lane beside chunks, ascending; 0 is for steps that sample nothing.
        chunk_rows: of the second lane, ascending.
        chunk: tokens of a row of the second lane.
    """

    decode_rows: tuple[int, ...]
    mixed_rows: tuple[int, ...]
    chunk_rows: tuple[int, ...]
    chunk: int

    def __post_init__(self) -> None:
        for name in ("decode_rows", "mixed_rows", "chunk_rows"):
            rows, least = getattr(self, name), 0 if name == "mixed_rows" else 1
            if not rows or list(rows) != sorted(set(rows)) or rows[0] < least:
                raise ValueError(f"{name}={rows}; use ascending numbers from {least} on")
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}; use at least 1")

    @classmethod
    def choose(cls, max_num_seqs: int, max_num_batched_tokens: int) -> StepShapes:
        """Shapes for the default device, for steps of so many requests and tokens.

        A CPU feels every padded row, and gathers the pages of a row for each of its own; wide rows
        fill the matrix units of accelerators, which decode 8 rows in the time of one.
        """
        import jax  # the simulator needs none

        cpu = jax.default_backend() == "cpu"
        chunk = min(32 if cpu else 128, max_num_batched_tokens)
        # A chunk of one token is a row of the first lane, so there are at most so many others.
        chunks = min(max_num_seqs, max(1, max_num_batched_tokens // 2))
        full = max_num_batched_tokens // chunk
        most = full + chunks
        if not cpu:
            decode_rows, chunk_rows = powers(8, max_num_seqs, 4), powers(1, most, 4)
        else:
            decode_rows = _with_halves(powers(1, max_num_seqs, 2))
            # Most steps with chunks are nearly full, or fuller where prompts end within rows.
            near = {rows for rows in (full * 3 // 4, full * 3 // 2) if 1 <= rows < most}
            chunk_rows = tuple(sorted({*powers(1, most, 2), *near}))
        return cls(decode_rows, (0, *powers(8, max_num_seqs, 8)), chunk_rows, chunk)

    def fit(self, rows: int, chunk_rows: int) -> tuple[int, int]:
        """Rows of both lanes for so many."""
        if not chunk_rows:
            return _first(self.decode_rows, rows), 0
        return _first(self.mixed_rows, rows), _first(self.chunk_rows, chunk_rows)

    def all(self) -> list[tuple[int, int]]:
        """Every pair that `fit` can give."""
        mixed = itertools.product(self.mixed_rows, self.chunk_rows)
        return [*((rows, 0) for rows in self.decode_rows), *mixed]


def _first(sizes: tuple[int, ...], needed: int) -> int:
    return next(size for size in sizes if size >= needed)


def powers(least: int, most: int, factor: int) -> tuple[int, ...]:
    """`least` and its multiples by powers of the factor below `most`, and `most`."""
    sizes, size = [], least
    while size < most:
        sizes.append(size)
        size *= factor
    return (*sizes, most)


def _with_halves(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes, and those halfway between two neighbours."""
    return tuple(sorted({*sizes, *((a + b) // 2 for a, b in itertools.pairwise(sizes))}))
