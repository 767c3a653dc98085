"""TPU slices by name: what their chips can do, and which shapes there are."""

from __future__ import annotations

import dataclasses
import math
import re

from fusedkv_jax.training.monitoring.metrics import device_peak_flops

_GIB = 2**30
_FLAT = tuple("1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split())
_SMALL = tuple("2x2x1 2x2x2 2x2x4 2x4x4".split())


class TopologyError(ValueError):
    """A name of a slice that does not exist."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of TPU; figures are for one device as JAX counts devices.

    From cloud.google.com/tpu/docs (pages v5e, v6e, v5p, tpu7x): HBM bandwidth, and interconnect
    bandwidth, which is given for both directions together and halved here. `hbm` is what the
    compiler lets a program use; it names the figure when a program needs more.

    Attributes:
      name: as in names of slices.
      kind: JAX's name of it.
      per_chip: devices of a chip; the two cores of a tpu7x are a device each.
      hbm: bytes of memory that a program can use.
      hbm_bandwidth: bytes a second.
      ici: bytes a second that a device can send to other chips, over all its links.
      shapes: those of slices, as text; larger ones have multiples of 4 along all axes.
      largest: chips along each axis of the largest slice.
    """

    name: str
    kind: str
    per_chip: int = 1
    hbm: int
    hbm_bandwidth: float
    ici: float
    shapes: tuple[str, ...]
    largest: tuple[int, ...]

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        peak = device_peak_flops(self.kind)
        assert peak is not None, self.kind
        return peak

    @property
    def choices(self) -> str:
        """The slices that there are, in words."""
        text = ", ".join(self.shapes)
        if len(self.largest) == 3:
            text += f" or multiples of 4 up to {'x'.join(map(str, self.largest))}"
        return f"{self.name}:{text}"


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            kind="TPU v5 lite",
            hbm=int(15.75 * _GIB),
            hbm_bandwidth=819e9,
            ici=200e9,
            shapes=_FLAT,
            largest=(16, 16),
        ),
        Chip(
            name="v6e",
            kind="TPU v6 lite",
            hbm=int(31.25 * _GIB),
            hbm_bandwidth=1640e9,
            ici=400e9,
            shapes=_FLAT,
            largest=(16, 16),
        ),
        Chip(
            name="v5p",
            kind="TPU v5",
            hbm=int(95.74 * _GIB),
            hbm_bandwidth=2765e9,
            ici=600e9,
            shapes=_SMALL,
            largest=(16, 16, 24),
        ),
        Chip(
            name="tpu7x",
            kind="TPU7x",
            per_chip=2,
            hbm=int(94.75 * _GIB),
            hbm_bandwidth=7380e9 / 2,
            ici=600e9 / 2,
            shapes=_SMALL,
            largest=(16, 24, 24),
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are connected to each other.

    Attributes:
      chip: their kind.
      shape: chips along each axis of the torus.
    """

    chip: Chip
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> Slice:
        """The slice of a name such as "v5p:4x4x8".

        Raises:
          TopologyError: there is none; the message lists those that there are.
        """
        match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
        chip = CHIPS.get(match.group(1)) if match else None
        if match is None or chip is None:
            known = "; ".join(chip.choices for chip in CHIPS.values())
            raise TopologyError(f"topology {name!r} is unknown; known are {known}")
        shape = tuple(int(size) for size in match.group(2).split("x"))
        cube = len(chip.largest) == 3 and len(shape) == 3 and all(n and n % 4 == 0 for n in shape)
        fits = all(n <= most for n, most in zip(sorted(shape), chip.largest, strict=False))
        if match.group(2) not in chip.shapes and not (cube and fits):
            raise TopologyError(f"topology {name!r} does not exist; known are {chip.choices}")
        return cls(chip, shape)

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Devices as JAX counts them."""
        return self.chips * self.chip.per_chip

    def wraps(self, axis: int) -> bool:
        """Whether the chips along an axis are a ring, not a line."""
        size = self.shape[axis]
        return size == 16 if len(self.shape) == 2 else size % 4 == 0
