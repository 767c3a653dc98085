"""How much of a call a program computes at once: a committed table by device, and a rule."""

import dataclasses
import functools
import json
from importlib import resources
from typing import Any

KERNELS = ("decode", "forward", "backward_keys", "backward_queries")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Block sizes of one kernel.

    Attributes:
      rows: rows of queries (tokens times heads of a group), a power of two, at least 16.
      keys: tokens of a tile, a power of two, at least 16.
      warps: warps of a program, a power of two.
      stages: tiles in flight.
    """

    rows: int
    keys: int
    warps: int
    stages: int


@functools.cache
def table() -> tuple[dict[str, Any], ...]:
    """The committed entries, `pallas_kernels/tuned/gpu.json`."""
    text = resources.files("pallas_kernels").joinpath("tuned", "gpu.json").read_text("utf-8")
    return tuple(json.loads(text)["entries"])


def choose(
    kernel: str,
    device_kind: str,
    *,
    itemsize: int,
    stored: int,
    size: int,
    sources: int,
    rows: int,
    simple: bool,
) -> BlockSizes:
    """The first entry of the table that fits the call, else `heuristic`.

    Args:
      kernel: one of `KERNELS`.
      device_kind: the device's name.
      itemsize: bytes of a number of the queries.
      stored: bytes of a number of the sources.
      size: the larger head size, padded to a power of two.
      sources: the larger number of sources; 0 where a single one has no weights.
      rows: rows of queries of one KV head.
      simple: neither window nor segments, whose masks take registers.
    """
    for entry in table():
        if (
            entry["kernel"] == kernel
            and device_kind.startswith(tuple(entry["devices"]))
            and (entry["itemsize"], entry["stored"]) == (itemsize, stored)
            and size <= entry["size"]
            and sources <= entry["sources"]
            and rows <= entry.get("max_rows", rows)
            and (simple or not entry.get("simple", False))
        ):
            return BlockSizes(**{x: entry[x] for x in ("rows", "keys", "warps", "stages")})
    return heuristic(kernel, itemsize=itemsize, size=size, sources=sources, rows=rows)


def heuristic(kernel: str, *, itemsize: int, size: int, sources: int, rows: int) -> BlockSizes:
    """Small tiles that fit the shared memory of every GPU since compute capability 8.0."""
    wide = itemsize * size * max(1, sources)  # bytes of a token of one side
    keys = 64 if wide <= 512 else 32 if wide <= 1024 else 16
    if kernel == "decode":
        fitting = 16 if rows <= 16 else 32 if rows <= 32 else 64
        return BlockSizes(rows=fitting, keys=keys, warps=4, stages=2)
    if itemsize == 4:  # products in three parts need three times the registers
        return BlockSizes(rows=32 if size <= 64 else 16, keys=min(keys, 32), warps=4, stages=1)
    if kernel == "forward" and wide <= 512:
        return BlockSizes(rows=128, keys=keys, warps=8, stages=2)
    return BlockSizes(rows=64, keys=min(keys, 32), warps=8 if kernel == "forward" else 4, stages=1)
