"""What a schedule is given: some rows of a call, and where their queries and keys are."""

import dataclasses

from jax import Array

from pallas_kernels.masks import Mask
from pallas_kernels.xla.plan import BlockPlan
from pallas_kernels.xla.streams import Weighted
from pallas_kernels.xla.tiles import Places, Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowChunk:
    """Rows of a call that are computed at once, B of them.

    Attributes:
      how: what a score becomes.
      mask: who sees whom.
      plan: how many queries and keys make a block.
      q: queries [B, T, N, H].
      sources: streams of keys and values, and their weights.
      queries: places of the queries, [B or 1, T].
      keys: places of the keys, [B or 1, S].
    """

    how: Scores
    mask: Mask
    plan: BlockPlan
    q: Array
    sources: Weighted
    queries: Places
    keys: Places

    @property
    def groups(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[2] // self.sources[0].heads
