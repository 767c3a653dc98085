"""Static settings of a call on a TPU."""

import dataclasses
import math

import numpy as np
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.devices import Chip
from pallas_kernels.sources import MixedSources
from pallas_kernels.tpu.blocks import Blocks

LOG2E = math.log2(math.e)
Interpret = bool | pltpu.InterpretParams  # run on any device; the second also simulates copies


@dataclasses.dataclass(frozen=True)
class How:
    """Static settings of a call.

    Attributes:
      scale, softcap: of the scores.
      chip: what is compiled for.
      interpret: run on any device.
      blocks: tile of prefill and training; `Blocks.choose` where it is None.
      full, partial: there may be tiles without, and with, hidden scores.
      per_row: rows of the batch visit different tiles.
      holes: some keys of the arrays may be absent.
    """

    scale: float
    softcap: float | None
    chip: Chip
    interpret: Interpret = False
    blocks: Blocks | None = None
    full: bool = True
    partial: bool = True
    per_row: bool = False
    holes: bool = False

    @property
    def query_factor(self) -> float:
        """What the queries are multiplied with: base 2, unless a soft cap comes in between."""
        return self.scale * (LOG2E if self.softcap is None else 1.0)

    def tile(self, q: Array, sources: MixedSources) -> Blocks:
        """The tile of a call."""
        size, heads = sources.keys[0].shape[1:3]
        blocks = self.blocks or Blocks.choose(q.shape[2] // heads, q.shape[1], size)
        return blocks.on(self.chip, sources)

    def specialized(
        self, visited: Array | np.ndarray, full: Array | np.ndarray, holes: bool = False
    ) -> "How":
        """The settings for these tables of tiles."""
        known = isinstance(visited, np.ndarray)
        return dataclasses.replace(
            self,
            per_row=visited.shape[0] > 1,
            full=bool(full.any()) if known else True,
            partial=bool((visited & ~full).any()) if known else True,
            holes=holes,
        )
