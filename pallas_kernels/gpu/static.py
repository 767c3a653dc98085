"""What the compilers for NVIDIA GPUs say of the kernels: registers, spills, shared memory.

Works on any machine: the launches of a call are recorded while it is traced, and each is
compiled for compute capability 9.0 by Triton and by the `ptxas` that comes with it. Nothing
here says how fast a kernel is.
"""

import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import gpu, quantize
from pallas_kernels.gpu.device import Constants, GpuTarget, kernel, missing
from pallas_kernels.masks import Mask
from pallas_kernels.paged import Pages
from pallas_kernels.sources import Source

SHARED_LIMIT = 232448  # bytes a program may have on an H100
_H100 = {"kind": "NVIDIA H100", "cores": 132, "compute_capability": 90}
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A class of shapes that is reported.

    Attributes:
      name: what the report calls it.
      length: query tokens.
      keys: cached tokens.
      size: head size.
      sources: sources of keys and of values; 0 for one without weights.
      storage: dtype of the sources.
      dtype: dtype of the queries.
      paged: the sources are pages.
      grad: also the backward pass.
      packed: with segments and a window, the mask that takes most registers.
    """

    name: str
    length: int
    keys: int = 4096
    size: int = 128
    sources: int = 2
    storage: str = "bfloat16"
    dtype: str = "bfloat16"
    paged: bool = False
    grad: bool = False
    packed: bool = False


CALLS = tuple(
    Workload(name=f"{name} H={size}", size=size, **options)
    for size in (64, 128)
    for name, options in {
        "prefill, plain": {"length": 4096, "sources": 0},
        "training, fused": {"length": 4096, "grad": True},
        "decode, plain": {"length": 1, "sources": 0},
        "decode, fused": {"length": 1},
        "decode, fused, pages": {"length": 1, "paged": True},
        "decode, fused, int8": {"length": 1, "storage": "int8"},
        "decode, fused, int8 pages": {"length": 1, "storage": "int8", "paged": True},
        "decode, fused, e4m3": {"length": 1, "storage": "float8_e4m3fn"},
    }.items()
)


def report(shapes: tuple[Workload, ...] = CALLS) -> list[dict[str, Any]]:
    """A line for every kernel of every call: call, kernel, block sizes, registers, spill (bytes
    stored), shared (bytes), wgmma (instructions of the matrix units of Hopper).

    Raises:
      NotImplementedError: triton or jax-triton is missing.
    """
    missing()
    lines = []
    for call in shapes:
        for launch in launches(call):
            lines.append({"call": call.name, **line(launch)})
    return lines


def line(launch: Launch) -> dict[str, Any]:
    """The report's line of one launch."""
    sizes = {"rows": launch.constants.get("BM"), "keys": launch.constants.get("BN")}
    return {
        "kernel": launch.name.split(".")[1],
        **sizes,
        "warps": launch.warps,
        "stages": launch.stages,
        **compiled(launch),
    }


def launches(call: Workload) -> list[Launch]:
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

    device = GpuTarget(**_H100, launch=record)
    jax.eval_shape(functools.partial(trace, call, device))
    return found


def trace(call: Workload, device: GpuTarget) -> tuple:
    """The call itself, to be traced or lowered: nothing of these sizes is ever computed."""
    count = max(1, call.sources)
    q = jnp.zeros((2, call.length, 32, call.size), call.dtype)
    weights = jnp.ones((count, 8, call.size)) if call.sources else None
    options = {"scale": call.size**-0.5, "softcap": None, "device": device}
    lengths = jnp.full((2,), call.keys)
    if call.paged:
        pages = Pages.create(
            num_pages=64, page_size=64, num_kv_heads=8, num_keys=count, num_values=count,
            key_size=call.size, value_size=call.size, dtype=call.storage,
        )  # fmt: skip
        table = jnp.zeros((2, call.keys // 64), jnp.int32)
        return gpu.paged_attention(
            q, pages, table, lengths, weights, weights, window=None, **options
        )
    source = jnp.zeros((2, call.keys, 8, call.size), call.dtype)
    if call.storage != call.dtype:
        source = quantize(source, call.storage)
    mask = Mask(causal=True, kv_lengths=lengths)
    if call.packed:
        segments = [jnp.zeros((2, x), jnp.int32) for x in (call.length, call.keys)]
        mask = dataclasses.replace(
            mask, window=1024, q_segment_ids=segments[0], kv_segment_ids=segments[1]
        )

    def run(q: Array, sources: Sequence[Source]) -> tuple[Array, Array]:
        return gpu.attention(q, sources, sources, weights, weights, mask, **options)

    if not call.grad:
        return run(q, (source,) * count)
    out, pull = jax.vjp(run, q, (source,) * count)
    return pull(out)


def entry_calls(entry: dict[str, Any]) -> tuple[Workload, ...]:
    """Calls that use an entry of the table."""
    storage = {1: "int8", 2: "bfloat16"}[entry["stored"]]
    call = functools.partial(
        Workload,
        name=entry["kernel"],
        size=entry["size"],
        sources=entry["sources"],
        storage=storage,
    )
    if entry["kernel"] == "decode":
        return tuple(call(length=entry["max_rows"] // 4, paged=x) for x in (False, True))
    grad = entry["kernel"] != "forward"
    masks = (not entry["simple"],) if "simple" in entry else (False, True)
    return tuple(call(length=4096, grad=grad, packed=x) for x in masks)


def compiled(launch: Launch, *, compute_capability: int = 90) -> dict[str, int]:
    """Registers a thread, bytes spilled, bytes of shared memory, count of wgmma instructions."""
    triton = _triton()
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel(launch.name)
    names = function.arg_names
    constants = dict(launch.constants)
    types = dict(zip(names, launch.types, strict=False))
    signature = {x: "constexpr" if x in constants else types[x] for x in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, x in enumerate(names) if signature[x][0] == "*"
    }
    built = triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", compute_capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        code = pathlib.Path(folder, "kernel.ptx")
        code.write_text(built.asm["ptx"])
        suffix = "a" if compute_capability >= 90 else ""
        ptxas = pathlib.Path(str(nvidia.__file__)).parent / "bin" / "ptxas"
        log = subprocess.run(
            [ptxas, "-v", f"--gpu-name=sm_{compute_capability}{suffix}", code, "-o", os.devnull],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    number = lambda pattern: int(re.search(pattern, log).group(1))  # noqa: E731  # pyright: ignore
    return {
        "registers": number(r"Used (\d+) registers"),
        "spill": number(r"(\d+) bytes spill stores"),
        "shared": built.metadata.shared,
        "wgmma": built.asm["ptx"].count("wgmma.mma_async"),
    }


def _triton() -> ModuleType:
    """Triton with its own folder as cache: jax-triton sets the variable to nothing."""
    if os.environ.get("TRITON_CACHE_DIR") == "":
        del os.environ["TRITON_CACHE_DIR"]
    import triton

    return triton
