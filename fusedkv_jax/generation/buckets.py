"""Sizes of arrays: rounded up, so that few programs serve all lengths."""

from __future__ import annotations

from dataclasses import dataclass

from fusedkv_jax.generation.parts import part_ends
from fusedkv_jax.generation.placement import Placement
from fusedkv_jax.generation.sampling import bucket
from fusedkv_jax.generation.settings import EngineSettings

SHORTEST_BUCKET = 16


@dataclass(frozen=True)
class Buckets:
    """How sizes are rounded.

    Powers of two at most double an array, and lengths up to L need log2(L) programs.

    Attributes:
        settings: whether to round, and what bounds a step of prefill.
        placement: rows divide over its mesh.
    """

    settings: EngineSettings
    placement: Placement

    def size(self, size: int, least: int = SHORTEST_BUCKET) -> int:
        """A length."""
        return bucket(size, least) if self.settings.bucketing else max(1, size)

    def rows(self, count: int) -> int:
        """Rows of arrays for `count` rows: a bucket that divides over the mesh."""
        return self.placement.rows(self.size(count, 1))

    def width(self, rows: int, most: int | None = None) -> int | None:
        """Tokens of a row in a chunk, so that all rows keep within the budget, and within `most`.

        None where nothing bounds them. Rounded down, as the budget is a bound.
        """
        limits = [x for x in (self.settings.max_num_batched_tokens, most) if x is not None]
        if not limits:
            return None
        width = max(1, min(limits) // rows)
        return 1 << (width.bit_length() - 1) if self.settings.bucketing else width

    def ends(self, columns: int) -> tuple[int, ...] | None:
        """Where the parts of prompts end; None for prefill in one piece, as of very short ones."""
        workers, parts = self.placement.workers, self.settings.prefill_parts
        if parts is None or columns < workers:
            return None
        return part_ends(columns, workers, parts)
