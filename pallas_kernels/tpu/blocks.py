"""Block sizes of the TPU kernels, and how they are chosen."""

import dataclasses

LANES = 128


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below the number."""
    return -(-number // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile of the prefill and training kernels.

    Attributes:
      queries: tokens of a query block; G heads times these are the rows that share a key tile.
      keys: tokens of a key block, which one copy brings.
      compute: keys per product: bounds the score tile; divides `keys`.
    """

    queries: int
    keys: int
    compute: int

    def __post_init__(self):
        if self.queries % 16 or self.keys % self.compute or self.compute % LANES:
            raise ValueError(
                f"{self}: queries must be a multiple of 16, compute of {LANES}, keys of compute"
            )

    @classmethod
    def choose(cls, groups: int, num_queries: int, num_keys: int, rows: int = 1024) -> "Blocks":
        """About `rows` rows share a key tile: enough to pay for its mixing and for its copy."""
        queries = max(16, min(rows // groups // 16 * 16, round_up(num_queries, 16)))
        keys = min(1024, round_up(num_keys, LANES))
        compute = next(x for x in (512, 384, 256, 128) if keys % x == 0)
        return cls(queries, keys, compute)
