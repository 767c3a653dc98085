"""How long everything in a call is, and where the tokens of a paged cache are."""

import dataclasses

from jax import Array

from pallas_kernels.gpu.operands import Sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paging:
    """Where tokens are, if not one after the other.

    Attributes:
      table: int32 [B, max_pages].
      size: tokens of a page.
    """

    table: Array
    size: int


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


def lengths(q: Array, keys: Sources, paging: Paging | None) -> Lengths:
    """The lengths of a call."""
    batch, length, heads, _ = q.shape
    if paging is None:
        num_keys, kv_heads = keys.arrays[0].shape[1:3]
    else:
        num_keys, kv_heads = paging.table.shape[1] * paging.size, keys.arrays[0].shape[1]
    return Lengths(batch=batch, queries=length, keys=num_keys, heads=heads, kv_heads=kv_heads)
