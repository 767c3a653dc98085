"""How much of a call a program computes at once: a committed table by device, and a rule."""

import dataclasses
import functools
import json
from importlib import resources
from typing import Any

from pallas_kernels import devices
from pallas_kernels.gpu.device import GpuTarget

KERNELS = ("decode", "forward", "backward_keys", "backward_queries")


# (largest head size, most sources, (rows, keys, warps, stages)), the first that a call fits; of
# 16-bit queries. Hopper and Blackwell for servers: operands of products lie in shared memory.
_WIDE = {
    "forward": (
        (64, 0, (128, 64, 8, 2)),
        (128, 2, (128, 32, 8, 2)),
        (256, 4, (64, 16, 8, 1)),
    ),
    "backward_keys": ((128, 2, (64, 32, 8, 1)), (256, 4, (32, 32, 8, 1))),
    "backward_queries": ((128, 2, (64, 32, 8, 1)), (256, 4, (64, 16, 8, 1))),
}
# On 9.0 wgmma's addresses in shared memory, one for each 16 channels of an operand, are held too.
_HOPPER = _WIDE | {
    "backward_queries": (
        (128, 2, (64, 32, 8, 1)),
        (128, 4, (64, 16, 8, 1)),
        (256, 4, (32, 16, 8, 1)),
    )
}
# All others (8.x, 12.x): operands are registers too.
_NARROW = {
    "forward": (
        (64, 0, (128, 64, 8, 2)),
        (64, 2, (128, 32, 8, 1)),
        (128, 2, (64, 32, 8, 1)),
        (64, 4, (32, 32, 4, 1)),
        (128, 4, (32, 16, 8, 1)),
        (256, 2, (32, 16, 8, 1)),
        (256, 4, (16, 16, 4, 1)),
    ),
    "backward_keys": (
        (64, 2, (64, 64, 8, 2)),
        (128, 2, (32, 64, 8, 1)),
        (128, 4, (32, 32, 8, 1)),
        (256, 4, (16, 16, 4, 1)),
    ),
    "backward_queries": (
        (64, 0, (128, 32, 8, 2)),
        (128, 2, (32, 32, 8, 1)),
        (64, 4, (32, 32, 8, 1)),
        (256, 4, (16, 16, 4, 1)),
    ),
}


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What block sizes depend on in a call.

    Attributes:
      itemsize: bytes of a number of the queries.
      stored: bytes of a number of the sources.
      size: the larger head size, padded to a power of two.
      sources: the larger number of sources; 0 where a single one has no weights.
      rows: rows of queries of one KV head.
      simple: neither window nor segments, whose masks take registers.
    """

    itemsize: int
    stored: int
    size: int
    sources: int
    rows: int
    simple: bool


@functools.cache
def table() -> tuple[dict[str, Any], ...]:
    """The committed entries, `pallas_kernels/tuned/gpu.json`."""
    text = resources.files("pallas_kernels").joinpath("tuned", "gpu.json").read_text("utf-8")
    return tuple(json.loads(text)["entries"])


def choose(kernel: str, device: GpuTarget, call: Traits) -> BlockSizes:
    """The first entry of the table that fits the call, else `heuristic`.

    Args:
      kernel: one of `KERNELS`.
      device: what is compiled for.
      call: what is computed.
    """
    for entry in table():
        if (
            entry["kernel"] == kernel
            and device.kind.startswith(tuple(entry["devices"]))
            and (entry["itemsize"], entry["stored"]) == (call.itemsize, call.stored)
            and call.size <= entry["size"]
            and call.sources <= entry["sources"]
            and call.rows <= entry.get("max_rows", call.rows)
            and (call.simple or not entry.get("simple", False))
        ):
            return BlockSizes(**{x: entry[x] for x in ("rows", "keys", "warps", "stages")})
    return heuristic(kernel, device.compute_capability, call)


def heuristic(kernel: str, capability: int, call: Traits) -> BlockSizes:
    """What fits a GPU that is not in the table, and spills little, as `static` found it.

    Registers decide, not shared memory: a thread of a kernel that mixes holds, besides its part of
    the tile's products, weights and addresses of every source. Tiles shrink with the sources.
    None of the calls of `workloads` spills more than 64 bytes a thread on any of `static.CHIPS`.
    """
    if kernel == "decode":
        return _few_rows(capability, call)
    if call.itemsize == 4:  # products in three parts need three times the registers
        size = 32 if call.size <= 64 and call.sources <= 2 else 16
        return BlockSizes(rows=size, keys=16, warps=4, stages=1)
    rules = _HOPPER if capability == 90 else _WIDE if 90 < capability < 120 else _NARROW
    for size, sources, sizes in rules[kernel]:
        if call.size <= size and call.sources <= sources:
            return BlockSizes(**dict(zip(("rows", "keys", "warps", "stages"), sizes, strict=True)))
    raise AssertionError(f"{call} is beyond what the kernels hold")


def split_bytes(sizes: BlockSizes, call: Traits) -> int:
    """Shared memory of the split kernel at most, in bytes.

    It holds the queries folded with every source's weights from its first tile to its last, those
    of float32 in two parts (`tf32x3`); and besides a tile as it is copied, or as an operand.
    """
    parts = 2 if call.itemsize == 4 else 1
    sources = max(1, call.sources)
    queries = parts * sources * sizes.rows * call.size * call.itemsize
    copied = sizes.stages * sources * call.stored if sizes.stages > 1 else 0
    return queries + 2 * sizes.keys * call.size * max(copied, call.itemsize)


def _few_rows(capability: int, call: Traits) -> BlockSizes:
    """All rows in one block; tiles as wide as shared memory and registers allow."""
    rows = 16 if call.rows <= 16 else 32 if call.rows <= 32 else 64
    token = 2 * call.stored * call.size * max(1, call.sources)  # bytes, of keys and values
    # Codes become numbers in registers, and so does everything for 64 rows.
    heavy = call.stored == 1 and rows > 16 or rows > 32
    room = devices.shared_memory(capability) * 3 // 4
    stages = 1 if heavy or call.itemsize == 4 or 2 * 16 * token > room else 2
    keys = next(x for x in (64, 32, 16) if x == 16 or stages * x * token <= room)
    keys = min(keys, 32 if heavy or call.size * max(1, call.sources) > 256 else 64)
    sizes = BlockSizes(rows=rows, keys=keys, warps=8 if heavy else 4, stages=stages)
    while sizes.keys > 16 and split_bytes(sizes, call) > devices.shared_memory(capability):
        sizes = dataclasses.replace(sizes, keys=sizes.keys // 2)
    return sizes
