"""How long a step takes on a modeled device: the roofline of its work."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from fusedkv_jax.compile_ahead.chips import SHAPES, Slice
from fusedkv_jax.serving.copies import Copy, Direction, count_runs
from fusedkv_jax.serving.plan import StepPlan
from fusedkv_jax.validation import check_type
from pallas_kernels.devices import GPUS

if TYPE_CHECKING:
    from fusedkv_jax.costs import StepCosts


@dataclasses.dataclass(frozen=True)
class Device:
    """One chip, or several that share every step (tensor parallelism).

    Attributes:
        name: of the chip or slice.
        flops: dense bfloat16 FLOP/s, of all chips.
        bandwidth: bytes of device memory a second, of all chips.
        memory: bytes that programs can use, of all chips.
        host_bandwidth: bytes a second between device and host memory, each way.
        compute_efficiency, memory_efficiency: fractions of the peaks that steps reach.
        overhead: seconds of a step apart from both.
        copy_overhead: seconds of starting one copy between host and device.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    host_bandwidth: float = 25e9
    compute_efficiency: float = 0.5
    memory_efficiency: float = 0.8
    overhead: float = 1e-3
    copy_overhead: float = 10e-6

    def num_pages(self, costs: StepCosts, page_size: int, utilization: float = 0.9) -> int:
        """Pages that fit beside the parameters.

        Raises:
            ValueError: not even the parameters fit.
        """
        left = utilization * self.memory - costs.parameter_bytes
        pages = int(left // (page_size * costs.cache_bytes_per_token))
        if pages < 1:
            raise ValueError(
                f"{self.name} has {self.memory / 2**30:.1f} GiB, of which a fraction of"
                f" {utilization} is used; the parameters need"
                f" {costs.parameter_bytes / 2**30:.1f} GiB"
            )
        return pages

    def seconds_per_page(self, costs: StepCosts, page_size: int) -> float:
        """What copying a page between host and device takes."""
        return page_size * costs.cache_bytes_per_token / self.host_bandwidth

    def step_seconds(self, costs: StepCosts, plan: StepPlan, page_size: int) -> float:
        """What a step takes: the larger of computing and reading, and the copies before it.

        Copies ahead of need and behind it run beside the step, both ways at once.
        """
        size = len(plan.requests)
        starts = np.fromiter((r.computed for r in plan.requests), np.int64, size)
        lengths = np.fromiter((r.length for r in plan.requests), np.int64, size)
        counts = np.asarray(plan.counts, np.int64)
        work = costs.work(starts, counts, starts + counts == lengths)
        compute = work.flops / (self.flops * self.compute_efficiency)
        read = work.weight_bytes + work.cache_bytes
        seconds = max(compute, read / (self.bandwidth * self.memory_efficiency)) + self.overhead
        if not plan.copies:
            return seconds
        page = page_size * costs.cache_bytes_per_token
        ahead, behind, before = (
            self._copies([copy for copy in plan.copies if copy.direction in directions], page)
            for directions in (
                (Direction.AHEAD,),
                (Direction.BEHIND,),
                (Direction.OUT, Direction.INTO, Direction.WITHIN),
            )
        )
        return max(seconds, ahead, behind) + before

    def _copies(self, copies: list[Copy], page: float) -> float:
        if not copies:
            return 0.0
        return len(copies) * page / self.host_bandwidth + count_runs(copies) * self.copy_overhead


def device(name: str) -> Device:
    """A device by name: a TPU slice such as "v5e:2x2", or "h100", "h200", "a100".

    Raises:
        ValueError: there is none of that name; the message lists those that there are.
    """
    check_type("device", name, str, ValueError)
    if name in GPUS:
        gpu = GPUS[name]
        return Device(name, gpu.flops, gpu.bandwidth, gpu.memory, gpu.host_bandwidth)
    if name in SHAPES:
        name = f"{name}:{SHAPES[name].small[0]}"
    try:
        place = Slice.parse(name)
    except ValueError as error:
        raise ValueError(f"{error}; or a GPU: {', '.join(GPUS)}") from None
    chip, number = place.chip, place.devices
    return Device(
        name,
        flops=number * chip.flops,
        bandwidth=number * chip.hbm_bandwidth,
        memory=number * chip.hbm,
        host_bandwidth=number * 16e9,
    )
