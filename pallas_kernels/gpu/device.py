"""The GPU that a call is compiled for, and how its kernels are launched."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
from jax import Array

Constants = dict[str, bool | int | float]  # of a kernel, by its parameter

_INSTALL = "pip install '.[gpu]'"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """What kernels need to know.

    Attributes:
      kind: the name that jax gives it, such as "NVIDIA H100 80GB HBM3".
      cores: streaming multiprocessors.
      compute_capability: 90 for 9.0.
      launch: (kernel, arguments, out, grid, constants, warps, stages, device) -> outputs, with
        `kernel` the name of a function in a module of `gpu.kernels`, "module.function".
    """

    kind: str
    cores: int
    compute_capability: int
    launch: Callable[..., Any]


def current() -> GpuTarget:
    """The GPU of this machine.

    Raises:
      NotImplementedError: there is none, or the packages are missing; says what to install.
    """
    gpus = [x for x in jax.local_devices() if x.platform in ("gpu", "cuda")]
    if not gpus:
        raise NotImplementedError(
            f"needs an NVIDIA GPU, and jax sees only {jax.local_devices()[0].platform}; on a "
            f"machine with one: {_INSTALL}"
        )
    missing()
    capability = str(gpus[0].compute_capability)
    if not capability.replace(".", "").isdigit():
        raise NotImplementedError(f"needs an NVIDIA GPU; this one is {gpus[0].device_kind}")
    major, minor = capability.split(".")
    return GpuTarget(
        kind=gpus[0].device_kind,
        cores=int(gpus[0].core_count),
        compute_capability=int(major) * 10 + int(minor),
        launch=launch,
    )


def missing() -> None:
    """Raises NotImplementedError, saying what to install, where triton or jax-triton is absent."""
    absent = [
        name
        for package, name in (("triton", "triton"), ("jax_triton", "jax-triton"))
        if importlib.util.find_spec(package) is None
    ]
    if absent:
        raise NotImplementedError(f"needs {' and '.join(absent)}: {_INSTALL}")


def kernel(name: str) -> Any:
    """The kernel "module.function" of `pallas_kernels.gpu.kernels`; imports triton."""
    module, function = name.split(".")
    return getattr(importlib.import_module(f"pallas_kernels.gpu.kernels.{module}"), function)


@functools.cache
def _jax_triton() -> ModuleType:
    try:
        import jax_triton
    except ImportError as error:
        raise NotImplementedError(f"jax-triton cannot be imported ({error}): {_INSTALL}") from None
    return jax_triton


def launch(
    name: str,
    arguments: tuple[Array | int, ...],
    out: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    constants: Constants,
    warps: int,
    stages: int,
    device: GpuTarget,
) -> tuple[Array, ...]:
    """Launches a kernel through jax-triton.

    jax-triton 0.3 passes Python floats as float64, so every float is among `constants`.
    """
    return _jax_triton().triton_call(
        *arguments,
        kernel=kernel(name),
        out_shape=out,
        grid=grid,
        name=name.replace(".", "_"),
        num_warps=warps,
        num_stages=stages,
        compute_capability=device.compute_capability,
        **constants,
    )
