"""Block sizes of the TPU kernels, and how they are chosen."""

import dataclasses

from pallas_kernels.devices import Chip
from pallas_kernels.sources import MixedSources

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
      full: the same in the forward kernel where a tile hides nothing; 0 for what the chip takes.
    """

    queries: int
    keys: int
    compute: int
    full: int = 0

    def __post_init__(self):
        lengths = (self.compute, self.full or self.compute)
        if self.queries % 16 or any(self.keys % x or x % LANES for x in lengths):
            raise ValueError(
                f"{self}: queries must be a multiple of 16, compute and full of {LANES}, keys of "
                f"both"
            )

    @classmethod
    def choose(cls, groups: int, num_queries: int, num_keys: int, rows: int = 1024) -> "Blocks":
        """About `rows` rows share a key tile: enough to pay for its mixing and for its copy."""
        queries = max(16, min(rows // groups // 16 * 16, round_up(num_queries, 16)))
        # Not 640 or 896, which only 128 divides: ten keys in such short products cost eleven.
        keys = min(1024, round_up(num_keys, LANES if num_keys <= 512 else 2 * LANES))
        compute = next(x for x in (512, 384, 256, 128) if keys % x == 0)
        return cls(queries, keys, compute)

    def on(self, chip: Chip, sources: MixedSources) -> "Blocks":
        """With what the chip takes for `full`."""
        if self.full:
            return self
        full = _full(chip, sources)
        return dataclasses.replace(self, full=self.compute if self.keys % full else full)


def _full(chip: Chip, sources: MixedSources) -> int:
    """Keys per product of the forward kernel where nothing is hidden.

    As the compiler's schedules have it (`static`): with 256 instead of 512 the scores of 1,024 rows
    spill less, which is worth 9 to 14 % of the bundles on v5e and v5p, and 4 to 9 % on v6e and
    tpu7x; but where those mix sources, or tpu7x reads more than 128 channels, it costs 4 to 11 %.
    Tiles with hidden scores, and the backward kernel, gain nothing.
    """
    mixed = sources.key_weights is not None or sources.value_weights is not None
    wide = any(x.shape[3] > LANES for x in (*sources.keys, *sources.values))
    long = {"v6e": mixed, "tpu7x": mixed or wide}.get(chip.name, False)
    return 512 if long else 256
