"""The suite `kernels`: attention timed on an accelerator, or what compilers say of the kernels.

On a processor no kernel can be timed: the report is then static, schedules of the TPU compiler
beside stock splash attention, and what the GPU compilers need of registers and shared memory.
"""

import functools
from collections.abc import Callable

import jax

from experiments.benchmarks import kernels_static, kernels_timed, kernels_torch
from experiments.benchmarks.report import Measurement


def measurements(
    *, quick: bool, rounds: int, torch_compile: bool
) -> dict[str, Callable[[], Measurement]]:
    """The measurements of the suite by name, for the device at hand; see `cpu.measurements`.

    Args:
      quick: toy sizes, or the first kernel only.
      rounds: turns of each contestant.
      torch_compile: compile PyTorch's flex attention, which is slow otherwise.
    """
    platform = jax.devices()[0].platform
    if platform == "cpu":
        return {
            "tpu_schedules": lambda: kernels_static.tpu_schedules(quick=quick),
            **{
                f"gpu_resources_{chip}": functools.partial(
                    kernels_static.gpu_resources, chip, quick=quick
                )
                for chip in kernels_static.GPUS
            },
        }
    return timed(platform, quick=quick, rounds=rounds, torch_compile=torch_compile)


def timed(
    platform: str, *, quick: bool, rounds: int, torch_compile: bool
) -> dict[str, Callable[[], Measurement]]:
    """The measurements that need the device, by name."""
    names = kernels_timed.CONTESTANTS.get(platform, kernels_timed.CONTESTANTS["gpu"])
    heads = dict(heads=4, kv_heads=2) if quick else dict(heads=32, kv_heads=8)
    found: dict[str, Callable[[], Measurement]] = {}
    for size in (16,) if quick else (128, 64):
        for length in (32,) if quick else (4096, 16384):
            shape = kernels_timed.AttentionShape(
                batch=1, queries=length, keys=length, size=size, **heads
            )
            for phase, gradient in (("prefill", False), ("training", True)):
                measure = functools.partial(
                    kernels_timed.measure_sequence,
                    shape, gradient=gradient, quick=quick, rounds=rounds,
                )  # fmt: skip
                found[f"{phase}_{length}_{size}"] = functools.partial(measure, names=names)
                if platform != "tpu":
                    found[f"hopper_{phase}_{length}_{size}"] = functools.partial(
                        measure, names=kernels_timed.HOPPER
                    )
            found[f"torch_{length}_{size}"] = lambda shape=shape: kernels_torch.measure(
                shape, compiled=torch_compile, rounds=rounds
            )
        for batch, keys in ((2, 64),) if quick else ((1, 4096), (32, 4096), (1, 32768)):
            shape = kernels_timed.AttentionShape(
                batch=batch, queries=1, keys=keys, size=size, **heads
            )
            found[f"decode_{batch}x{keys}_{size}"] = lambda shape=shape: (
                kernels_timed.measure_decode(shape, names, quick=quick, rounds=rounds)
            )
    return found
