"""Compiles a program for a slice, and says what each device would hold, compute and send."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import jax

from fusedkv_jax.compile_ahead import collectives, roofline, work
from fusedkv_jax.compile_ahead.chips import Slice
from fusedkv_jax.compile_ahead.hlo import Module
from fusedkv_jax.compile_ahead.programs import Program

_NEEDED = re.compile(r"\(([\d.]+)([KMGTP]?)\) exceeds available HBM")
_USED = re.compile(r"Used ([\d.]+)([KMGTP]?) of [\d.]+[KMGTP]? hbm")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


class DoesNotFit(ValueError):
    """A program that needs more memory than a device has.

    Attributes:
      missing: bytes, to the compiler's precision.
    """

    def __init__(self, message: str, missing: int) -> None:
        super().__init__(message)
        self.missing = missing


@dataclasses.dataclass(frozen=True)
class Report:
    """One program on one slice; bytes and FLOPs are those of one device.

    Attributes:
      program: its name.
      parts: bytes of arguments, by what they are; "other" has the batch, and padding.
      temporaries: bytes of activations, gradients and whatever else is no argument, at the peak.
      code: bytes of the program itself.
      peak: bytes in all, where they are most.
      capacity: bytes that a program can use.
      flops: what is computed, recomputation included; of decoding in one turn of its loop, where
        attention is hidden in a kernel or a loop, at least the model's own.
      hbm: bytes that are read and written, likewise; of decoding at least the cache.
      collectives: by kind, how many run and what they send.
      kernels: how often each Pallas kernel runs.
      estimate: the least time.
      tokens: of one run, on all devices.
      compile_seconds: what compiling took.
    """

    program: str
    parts: dict[str, float]
    temporaries: int
    code: int
    peak: int
    capacity: int
    flops: float
    hbm: float
    collectives: dict[str, tuple[int, float]]
    kernels: dict[str, int]
    estimate: roofline.Roofline
    tokens: int
    compile_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the estimate's conclusions among them."""
        estimate = dataclasses.asdict(self.estimate) | {
            "seconds": self.estimate.seconds,
            "bound": self.estimate.bound,
            "utilization": self.estimate.utilization,
        }
        return dataclasses.asdict(self) | {"estimate": estimate}


def compile_program(program: Program, place: Slice) -> tuple[Any, float]:
    """The compiled program and the seconds it took.

    Raises:
      DoesNotFit: it needs more memory than a device has.
    """
    start = time.perf_counter()
    try:
        with jax.set_mesh(program.mesh):
            compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        raise does_not_fit(program, needed, place) from None
    return compiled, time.perf_counter() - start


def make_report(program: Program, place: Slice) -> Report:
    """Compile a program and analyze it.

    Raises:
      DoesNotFit: it needs more memory than a device has.
    """
    compiled, seconds = compile_program(program, place)
    return analyze(program, place, compiled, seconds)


def analyze(program: Program, place: Slice, compiled: Any, seconds: float) -> Report:
    """What a compiled program holds, and what it computes and sends; decoding for one token."""
    memory = compiled.memory_analysis()
    module = Module(compiled.as_text())
    if program.name == "decode":
        module = module.turn()
    found = collectives.collectives(module, program.mesh.size)
    flops = work.matrix_flops(module) + work.attention_flops(module, program.visible)
    kernels = work.kernel_calls(module)
    hbm = work.hbm_bytes(module) + ("decode" in kernels) * program.cache_reads
    if program.name == "decode":
        flops = max(flops, program.model_flops / program.mesh.size)
        hbm = max(hbm, program.cache_reads)
    where = [device.coords for device in program.mesh.devices.flat]
    chip = place.chip
    estimate = roofline.Roofline(
        flops / chip.flops,
        hbm / chip.hbm_bandwidth,
        roofline.communication_seconds(place, found, where),
        program.model_flops / program.mesh.size,
        chip.flops,
    )
    other = memory.argument_size_in_bytes - sum(program.parts.values())
    return Report(
        program.name,
        program.parts | {"other": max(0.0, other)},
        memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
        memory.generated_code_size_in_bytes,
        peak_bytes(memory),
        chip.hbm,
        flops,
        hbm,
        collectives.totals(found),
        kernels,
        estimate,
        program.tokens,
        seconds,
    )


def peak_bytes(memory: Any) -> int:
    """Bytes of a device that a program takes, from its `memory_analysis()`.

    Arguments and results are in the compiler's peak. `temp_size_in_bytes` is no part of it: on TPUs
    that adds up what lives at different times, and is more than what is ever held.
    """
    return memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes


def needed_bytes(message: str) -> int | None:
    """Bytes that a program needs by the compiler's error; None if it is about something else."""
    found = _NEEDED.search(message) or _USED.search(message)
    return round(float(found.group(1)) * _UNITS[found.group(2)]) if found else None


def does_not_fit(program: Program, needed: int, place: Slice) -> DoesNotFit:
    """The error, with what is missing and what to change."""
    missing = needed - place.chip.hbm
    held = ", ".join(f"{part} {gib(size)}" for part, size in program.parts.items())
    return DoesNotFit(
        f"the {program.name} program does not fit {place.name}: a device needs {needed:,} bytes "
        f"({gib(needed)}; {held}) and has {gib(place.chip.hbm)}, so {missing:,} bytes "
        f"({gib(missing)}) are missing; {program.remedies}",
        missing,
    )


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB"
