"""TPU slices by name: which shapes there are of which chips (`pallas_kernels.devices`)."""

from __future__ import annotations

import dataclasses
import math
import re

from pallas_kernels.devices import CHIPS, Chip

_FLAT = tuple("1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split())
_SMALL = tuple("2x2x1 2x2x2 2x2x4 2x4x4".split())


class TopologyError(ValueError):
    """A name of a slice that does not exist."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Which slices there are of a kind of chip.

    Attributes:
      small: shapes, as text; larger ones have multiples of 4 along all axes.
      largest: chips along each axis of the largest slice.
    """

    small: tuple[str, ...]
    largest: tuple[int, ...]

    def choices(self, chip: str) -> str:
        """The slices of this chip, in words."""
        text = ", ".join(self.small)
        if len(self.largest) == 3:
            text += f" or multiples of 4 up to {'x'.join(map(str, self.largest))}"
        return f"{chip}:{text}"


SHAPES = {
    "v5e": Shapes(_FLAT, (16, 16)),
    "v6e": Shapes(_FLAT, (16, 16)),
    "v5p": Shapes(_SMALL, (16, 16, 24)),
    "tpu7x": Shapes(_SMALL, (16, 24, 24)),
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
            known = "; ".join(shapes.choices(chip) for chip, shapes in SHAPES.items())
            raise TopologyError(f"topology {name!r} is unknown; known are {known}")
        shapes = SHAPES[chip.name]
        shape = tuple(int(size) for size in match.group(2).split("x"))
        cube = len(shapes.largest) == 3 and len(shape) == 3 and all(n and n % 4 == 0 for n in shape)
        fits = all(n <= most for n, most in zip(sorted(shape), shapes.largest, strict=False))
        if match.group(2) not in shapes.small and not (cube and fits):
            raise TopologyError(
                f"topology {name!r} does not exist; known are {shapes.choices(chip.name)}"
            )
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
