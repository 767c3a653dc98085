"""The least time that a program can take on a slice, by arithmetic: an estimate, nothing is run.

compute        FLOPs / peak FLOP/s
memory         bytes of HBM / bandwidth
communication  sum over collectives of bytes sent / bandwidth of the links they can use
time           the largest of the three: all else is hidden behind it, which no program reaches
utilization    model FLOPs / (time x peak): an upper bound of the MFU of arXiv 2204.02311
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from fusedkv_jax.compile_ahead.chips import Slice
from fusedkv_jax.compile_ahead.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one run of a program.

    Attributes:
      compute, memory, communication: each alone.
      model_flops: FLOPs of one device without recomputation.
      peak_flops: of one device.
    """

    compute: float
    memory: float
    communication: float
    model_flops: float
    peak_flops: float

    @property
    def seconds(self) -> float:
        """The largest of the three."""
        return max(self.compute, self.memory, self.communication)

    @property
    def bound(self) -> str:
        """Which it is."""
        terms = ("compute", "memory", "communication")
        return max(terms, key=lambda name: getattr(self, name))

    @property
    def utilization(self) -> float:
        """Model FLOPs utilization at that time, 0 to 1."""
        return self.model_flops / (self.seconds * self.peak_flops)


def communication_seconds(
    place: Slice, collectives: Iterable[Collective], coordinates: Sequence[Sequence[int]]
) -> float:
    """Time of all collectives one after the other.

    Args:
      place: the slice.
      collectives: the collectives.
      coordinates: of the chip of each device, in the order of the program's devices.
    """
    seconds = 0.0
    for one in collectives:
        where = [coordinates[device] for device in one.group]
        seconds += one.count * one.nbytes / group_bandwidth(place, where)
    return seconds


def group_bandwidth(place: Slice, where: Sequence[Sequence[int]]) -> float:
    """Bytes a second that a device can send to the others of its group.

    A chip has the same links along every axis. A group uses those along the axes it extends over:
    in both directions where it is a whole ring, else in one.

    Args:
      place: the slice.
      where: coordinates of the group's chips.
    """
    total = 0.0
    for axis, size in enumerate(place.shape):
        spread = len({coordinates[axis] for coordinates in where})
        if spread > 1:
            ring = spread == size and place.wraps(axis)
            total += place.chip.ici / len(place.shape) * (1 if ring else 0.5)
    return total or place.chip.ici  # cores of one chip
