"""The shape of a mesh of devices, as a configuration says it; `sharding` makes it."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from fusedkv_jax.validation import validate

AXES = ("data", "fsdp", "context", "tensor")
AxisTypes = Literal["auto", "explicit"]


class MeshError(ValueError):
    """A mesh that does not fit the devices, the model or the batch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The shape of the mesh.

    Attributes:
      data: copies of the model, each with its part of the batch; -1 takes what the others leave.
      fsdp: parts into which parameters, gradients and optimizer state are split, each with its
        part of the batch (ZeRO-3).
      context: parts of every sequence.
      tensor: parts of every layer's heads, feed-forward and vocabulary.
      devices: use the first so many devices; None uses all.
      axis_types: `auto` or `explicit` axes, which say whether the types of arrays that a program
        of your own handles have shardings. The model is computed alike.
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    devices: int | None = None
    axis_types: AxisTypes = "auto"

    def __post_init__(self) -> None:
        validate(self, MeshError, least={"devices": 1}, prefix="mesh.")
        for axis in AXES:
            size = getattr(self, axis)
            if size != -1 and size < 1:
                raise MeshError(f"mesh.{axis}={size} must be 1 or more, or -1 for the rest")
        if sum(getattr(self, axis) == -1 for axis in AXES) > 1:
            raise MeshError("only one axis of the mesh can be -1")

    def sizes(self, count: int) -> tuple[int, ...]:
        """Size of each of `AXES` on `count` devices.

        Raises:
          MeshError: they do not multiply to the number of devices.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        rest = next((axis for axis, size in sizes.items() if size == -1), None)
        text = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        if rest is None and fixed != count:
            raise MeshError(
                f"mesh {text} has {fixed} places for {count} devices; change an axis, set one to "
                f"-1, or use fewer devices with mesh.devices={fixed}"
            )
        if count % fixed:
            raise MeshError(f"mesh {text}: {fixed} does not divide the {count} devices")
        if rest is not None:
            sizes[rest] = count // fixed
        return tuple(sizes[axis] for axis in AXES)
