"""What the kernels of a call are given: queries, both sides, the mask, and how long all is."""

import dataclasses

from jax import Array

from pallas_kernels.gpu.operands import Sources
from pallas_kernels.masks import Mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paging:
    """Where tokens are, if not one after the other.

    Attributes:
      table: int32 [B, max_pages].
      size: tokens of a page.
      slots: int32 [J + J'], slot of each stream in its pool; None for pages of records.
      pool: tokens of a slot.
    """

    table: Array
    size: int
    slots: Array | None = None
    pool: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """The lengths of a call: batch, T, S, N heads of queries, K of keys; G = N // K."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int

    @property
    def groups(self) -> int:
        """G."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Rows of queries of one KV head."""
        return self.queries * self.groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What every kernel of a call reads.

    Attributes:
      q: [B, T, N, H].
      keys, values: both sides.
      mask: which keys a query sees.
      scale, softcap: of the scores.
      paging: None where tokens lie one after the other.
    """

    q: Array
    keys: Sources
    values: Sources
    mask: Mask
    scale: float
    softcap: float | None
    paging: Paging | None = None

    @property
    def lengths(self) -> Lengths:
        """How long everything is."""
        batch, length, heads, _ = self.q.shape
        stored = self.keys.arrays[0].shape
        if self.paging is None:
            num_keys, kv_heads = stored[1:3]
        else:
            num_keys = self.paging.table.shape[1] * self.paging.size
            pooled = self.paging.slots is not None
            kv_heads = stored[3] // self.keys.size if pooled else stored[1]
        return Lengths(batch=batch, queries=length, keys=num_keys, heads=heads, kv_heads=kv_heads)
