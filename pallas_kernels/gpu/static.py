"""What the compilers for NVIDIA GPUs say of the kernels: registers, spills, shared memory.

Works on any machine: the launches of a call are recorded while it is traced, and each is compiled
for a chip of `devices.GPUS` by Triton and by the `ptxas` that comes with it. Nothing here says
how fast a kernel is.
"""

import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.devices import GPUS
from pallas_kernels.gpu import workloads
from pallas_kernels.gpu.device import Constants, GpuTarget, kernel, launch, missing
from pallas_kernels.gpu.workloads import Workload

CHIPS = ("a100", "l40s", "h100", "b200")  # one of each compute capability
SPILL = 64  # bytes of a thread that a kernel outside the table may spill
_TYPES = {
    "bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int8": "*i8", "int32": "*i32",
    "float8_e4m3fn": "*fp8e4nv", "float8_e5m2": "*fp8e5",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    name: str
    types: tuple[str, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


def target(chip: str, launch: Callable[..., Any] = launch) -> GpuTarget:
    """A chip of `devices.GPUS`, whether there is one here or not."""
    facts = GPUS[chip]
    return GpuTarget(
        kind=facts.kinds[0],
        cores=facts.cores,
        compute_capability=facts.capability,
        launch=launch,
    )


def report(chip: str, shapes: Sequence[Workload] = workloads.CALLS) -> list[dict[str, Any]]:
    """A line for every kernel of every call; see `line`.

    Raises:
      NotImplementedError: triton or jax-triton is missing.
    """
    missing()
    lines: list[dict[str, Any]] = []
    seen: list[Launch] = []
    for call in shapes:
        for found in launches(call, chip):
            if found not in seen:  # the kernel that adds up splits is the same for many calls
                seen.append(found)
                lines.append({"chip": chip, "call": call.name, **line(found, chip)})
    return lines


def line(made: Launch, chip: str = "h100") -> dict[str, Any]:
    """What is reported of a launch: its kernel, block sizes, and what `compiled` finds."""
    sizes = {"rows": made.constants.get("BM"), "keys": made.constants.get("BN")}
    return {
        "kernel": made.name.split(".")[1],
        **sizes,
        "warps": made.warps,
        "stages": made.stages,
        **compiled(made, GPUS[chip].capability),
    }


def launches(call: Workload, chip: str = "h100") -> list[Launch]:
    """The launches of a call with 32 query heads and 8 KV heads, recorded while tracing."""
    found: list[Launch] = []

    def record(
        name: str,
        arguments: tuple[Array | int, ...],
        out: tuple[jax.ShapeDtypeStruct, ...],
        grid: tuple[int, ...],
        constants: Constants,
        warps: int,
        stages: int,
        device: GpuTarget,
    ) -> tuple[Array, ...]:
        types = ["i32" if isinstance(x, int) else _TYPES[str(x.dtype)] for x in (*arguments, *out)]
        found.append(Launch(name, tuple(types), constants, warps, stages))
        return tuple(jnp.zeros(x.shape, x.dtype) for x in out)

    jax.eval_shape(functools.partial(workloads.trace, call, target(chip, record)))
    return found


def compiled(made: Launch, compute_capability: int = 90) -> dict[str, int]:
    """What the compilers make of a launch.

    Returns:
      registers: of a thread.
      spill: bytes of a thread that are stored to memory for want of registers.
      shared: bytes of shared memory.
      wgmma: instructions of Hopper's matrix units; `serialized`: 1 where the assembler waits for
        each of them (its warning C7515), as it could not keep their operands apart.
    """
    triton = _triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel(made.name)
    names = function.arg_names
    constants = dict(made.constants)
    types = dict(zip(names, made.types, strict=False))
    signature = {x: "constexpr" if x in constants else types[x] for x in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, x in enumerate(names) if signature[x][0] == "*"
    }
    built = triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", compute_capability, 32),
        options={"num_warps": made.warps, "num_stages": made.stages},
    )
    log = _assemble(built.asm["ptx"], compute_capability)
    number = lambda pattern: int(re.search(pattern, log).group(1))  # noqa: E731  # pyright: ignore
    return {
        "registers": number(r"Used (\d+) registers"),
        "spill": number(r"(\d+) bytes spill stores"),
        "shared": built.metadata.shared,
        "wgmma": built.asm["ptx"].count("wgmma.mma_async"),
        "serialized": int("C7515" in log),
    }


def _assemble(ptx: str, compute_capability: int) -> str:
    """What `ptxas` says of a program."""
    from triton.backends import nvidia

    tool = "ptxas-blackwell" if compute_capability >= 100 else "ptxas"
    suffix = "a" if compute_capability >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        code = pathlib.Path(folder, "kernel.ptx")
        code.write_text(ptx)
        return subprocess.run(
            [
                pathlib.Path(str(nvidia.__file__)).parent / "bin" / tool, "-v",
                f"--gpu-name=sm_{compute_capability}{suffix}", code, "-o", os.devnull,
            ],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip


def _triton() -> ModuleType:
    """Triton with its own folder as cache: jax-triton sets the variable to nothing."""
    if os.environ.get("TRITON_CACHE_DIR") == "":
        del os.environ["TRITON_CACHE_DIR"]
    import triton

    return triton
