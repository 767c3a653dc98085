"""The compiler's schedule of a kernel, as a stand-in for its speed where there is no TPU.

    python -m pallas_kernels.tpu.static

Bundles are instructions of the core, about one cycle each. Flags of the compiler that make it
write them down are undocumented, read when it starts, and blind to memory stalls and to how
often a branch runs: figures to compare kernels by, to within a tenth, never to gate on.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from pallas_kernels.masks import Mask
from pallas_kernels.sources import MixedSources
from pallas_kernels.tpu import attend, chips, folded, topology
from pallas_kernels.tpu.blocks import Blocks
from pallas_kernels.tpu.how import How

_NAME = "pallas_kernels.tpu.static"
_FLAGS = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*"
)
_ROWS = 1024  # rows that share a key tile
_KEYS = (512, 1024)  # key blocks whose difference cancels what comes before and after the loop
_SIZE, _LENGTH = 128, 4096


def schedule(
    chip: str, kernel: str, keys: int, rows: int = _ROWS, size: int = _SIZE, compute: int = 0
) -> dict:
    """Slots that one kernel uses, by name, and its `bundles`; compiled in a process of its own.

    Args:
      chip: a name of `topology.TOPOLOGIES`.
      kernel: "tile" (two sources), "plain" (the tile kernel on one source), "folded" (two
        sources side by side, through the same), "splash" (jax's own, on one source).
      keys: keys per block.
      rows: query rows that share a key tile.
      size: head size H.
      compute: keys of a product; 0 for what the chip takes (512 in splash).
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": _FLAGS.format(folder),
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "0",
        }
        command = [sys.executable, "-m", _NAME, "--compile", chip, kernel]
        command += map(str, (keys, rows, size, compute))
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{kernel} does not compile for {chip}: {done.stderr[-2000:]}")
        return _read(pathlib.Path(folder), done.stdout.split()[-1])


def _read(folder: pathlib.Path, kernel: str) -> dict[str, int]:
    """The table of one kernel's slots, summed over its bundles."""
    pattern = f"*-{kernel}.*final_hlo-static-per-bundle-utilization.txt"
    path = max(folder.glob(pattern), key=lambda p: p.stat().st_mtime)
    _, names, _, _, *lines = path.read_text().splitlines()
    rows = [[int(x) for x in line.split()] for line in lines if line.strip()]
    names = names.replace(",", " ").split()
    return dict(zip(names, map(sum, zip(*rows, strict=True)), strict=True), bundles=len(rows))


@functools.cache
def step_cost(
    chip: str, kernel: str, rows: int = _ROWS, size: int = _SIZE, compute: int = 0
) -> dict:
    """What 512 more keys cost in every column of `schedule`."""
    small, large = (schedule(chip, kernel, keys, rows, size, compute) for keys in _KEYS)
    return {name: large[name] - small[name] for name in large}


def splash_cost(chip: str, rows: int = _ROWS, size: int = _SIZE) -> dict:
    """`step_cost` of stock splash attention, with the better of two lengths of its products."""
    costs = (step_cost(chip, "splash", rows, size, keys) for keys in (256, 512))
    return min(costs, key=lambda cost: cost["bundles"])


def compare(chip: str, kernel: str, rows: int = _ROWS, size: int = _SIZE) -> dict:
    """A kernel beside stock splash attention at the same block sizes."""
    ours, stock = step_cost(chip, kernel, rows, size), splash_cost(chip, rows, size)["bundles"]
    return {
        "chip": chip,
        "kernel": kernel,
        "rows": rows,
        "head_size": size,
        "bundles": ours["bundles"],
        "splash_bundles": stock,
        "ratio": ours["bundles"] / stock,
        "matrix_slots": sum(x for name, x in ours.items() if "MXU" in name),
    }


def report() -> list[dict]:
    """`compare` for every way of reading two sources, and for one source, where each is used."""
    return [
        compare("v5e", "tile"),
        compare("v5e", "folded", size=64),
        compare("v5e", "plain"),
        compare("v6e", "folded"),
        compare("v6e", "plain"),
    ]


def _compile(chip: str, kernel: str, keys: int, rows: int, size: int, compute: int) -> str:
    """Compiles one kernel; returns its name in the dump."""
    spec = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    if kernel == "splash":
        sizes = splash.BlockSizes(block_q=rows, block_kv=keys, block_kv_compute=compute or 512)
        mask = splash_mask.MultiHeadMask([splash_mask.FullMask((_LENGTH, _LENGTH))])
        call = splash.make_splash_mha(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, save_residuals=True
        )
        topology.compile_for(chip, lambda *x: call(*x), *[spec(1, _LENGTH, size)] * 3)
        return "splash_mha_fwd_residuals"
    sources = 2 if kernel in ("tile", "folded") else 1
    run = folded.folded if kernel == "folded" else attend.tiled
    side: Any = (spec(1, _LENGTH, 1, size),) * sources  # shapes, as arrays will be
    weights: Any = spec(sources, 1, size, dtype=jnp.float32) if sources > 1 else None
    read = MixedSources(side, side, weights, weights)
    how = How(size**-0.5, None, chips.CHIPS[chip], blocks=Blocks(rows, keys, 512, compute))
    call = lambda q, s: run(how, q, s, Mask(causal=False))  # noqa: E731
    topology.compile_for(chip, call, spec(1, _LENGTH, 1, size), read)
    return "tile_forward"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        print(_compile(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:])))
    else:
        print("\n".join(map(json.dumps, report())))
