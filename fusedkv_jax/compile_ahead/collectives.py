"""The communication of a compiled program: what each chip sends, by kind of collective."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from fusedkv_jax.compile_ahead.hlo import Module, Visit

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_GROUPS = re.compile(
    r"replica_groups=(\{\{[\d,{}]*\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)"
)
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      count: how often it runs.
      nbytes: what one chip sends in one run, at best: of an array of S bytes over n chips
        S (n - 1) / n in an all-gather, a reduce-scatter or an all-to-all, twice that in an
        all-reduce, S in a permute.
      group: numbers of the devices that talk to each other, one of all such groups.
    """

    kind: str
    count: int
    nbytes: float
    group: tuple[int, ...]


def collectives(module: Module, devices: int) -> list[Collective]:
    """All collectives that run.

    Those that are split into a chain of fusions, as compilers for TPU do to overlap them with
    computation, count once.

    Args:
      module: the program.
      devices: number of devices that it runs on.
    """
    found: dict[tuple, Collective] = {}
    for number, visit in enumerate(module.visits):
        opcode = visit.instruction.opcode.removesuffix("-start")
        if opcode not in KINDS:
            continue
        channel = _CHANNEL.search(visit.instruction.text)
        key = (visit.schedule, channel.group(1) if channel else f"at {number}")
        if key not in found:
            found[key] = _collective(visit, opcode, _group(visit.instruction.text, devices))
    return [c for c in found.values() if len(c.group) > 1]


def totals(found: Iterable[Collective]) -> dict[str, tuple[int, float]]:
    """How many collectives of each kind run, and the bytes that they send."""
    sums: dict[str, tuple[int, float]] = {}
    for one in sorted(found, key=lambda one: KINDS.index(one.kind)):
        count, nbytes = sums.get(one.kind, (0, 0.0))
        sums[one.kind] = (count + one.count, nbytes + one.count * one.nbytes)
    return sums


def _collective(visit: Visit, kind: str, group: Sequence[int]) -> Collective:
    instruction, n = visit.instruction, len(group)
    sizes = [shape.nbytes for shape in instruction.shapes if shape.dtype != "u32"]
    if instruction.opcode == "all-gather-start":
        sizes = sizes[len(sizes) // 2 :]  # (arguments, results)
    elif instruction.opcode == "collective-permute-start":
        sizes = sizes[:1]
    total = sum(sizes)
    if kind == "reduce-scatter":
        total *= n  # the result is a part
    elif kind == "all-reduce" and _is_scattered(visit):
        kind = "reduce-scatter"
    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
    return Collective(kind, visit.count, total * share, tuple(group))


def _is_scattered(visit: Visit) -> bool:
    """An all-reduce of which each chip keeps a part, fused into what XLA runs as one operation."""
    return visit.fused and any(x.opcode == "dynamic-slice" for x in visit.computation.values())


def _group(text: str, devices: int) -> tuple[int, ...]:
    """The first group of devices that an instruction names; all if it names none."""
    pairs = _PAIRS.search(text)
    if pairs:
        return _connected(re.findall(r"\{(\d+),(\d+)\}", pairs.group(1)))
    mesh = _MESH.search(text)
    if mesh:
        return _mesh_group(*mesh.groups())
    groups = _GROUPS.search(text)
    if groups is None or groups.group(1) == "{}":
        return tuple(range(devices))
    if groups.group(1).startswith("{{"):
        return tuple(int(n) for n in groups.group(1)[2:].split("}")[0].split(","))
    shape, _, order = groups.group(1).partition("<=")
    sizes = [int(n) for n in re.findall(r"\d+", order.partition("T")[0])]
    axes = [int(n) for n in re.findall(r"\d+", order.partition("T")[2])]
    places = np.arange(math.prod(sizes)).reshape(sizes)
    places = places.transpose(axes) if axes else places
    rows = int(re.findall(r"\d+", shape)[0])
    return tuple(int(n) for n in places.reshape(rows, -1)[0])


def _mesh_group(axes: str, used: str) -> tuple[int, ...]:
    """Devices along some axes of a mesh; `'a':(p)s` is the part of axis a of size s, behind p."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    stride, strides = 1, {}
    for name in reversed(sizes):
        strides[name] = stride
        stride *= sizes[name]
    group = [0]
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used):
        count = int(size) if size else sizes[name]
        step = strides[name] * (sizes[name] // (count * int(before)) if size else 1)
        group = [place + step * i for place in group for i in range(count)]
    return tuple(group)


def _connected(pairs: Sequence[tuple[str, str]]) -> tuple[int, ...]:
    """The devices that a permute moves data between, from the first one on."""
    following = {int(source): int(target) for source, target in pairs}
    group = [next(iter(following))]
    while following.get(group[-1], group[0]) not in group:
        group.append(following[group[-1]])
    return tuple(group)
