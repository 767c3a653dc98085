"""Reads the text of a compiled XLA program: its instructions, and how often each runs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Iterator

from fusedkv_jax.compile_ahead.instructions import Instruction, Shape, parse_instruction

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')

Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction where it runs.

    Attributes:
      instruction: the instruction.
      computation: where it is written.
      count: how often it runs in one run of the program.
      schedule: name of the innermost computation around it that is not a fusion.
      fused: it is part of a fusion, so that its result is never in memory.
    """

    instruction: Instruction
    computation: Computation
    count: int
    schedule: str
    fused: bool


class Module:
    """A program.

    Args:
      text: what `compiled.as_text()` gives.

    Attributes:
      computations: by name, instructions by name.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self._entry = ""
        current: Computation = {}
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                current = self.computations.setdefault(header.group(2), {})
                if header.group(1):
                    self._entry = header.group(2)
            elif (instruction := parse_instruction(line)) is not None:
                current[instruction.name] = instruction

    @functools.cached_property
    def visits(self) -> tuple[Visit, ...]:
        """Every instruction that runs; bodies of loops as often as the loops turn.

        A loop whose end depends on data counts as one turn.
        """
        return tuple(self._walk(self._entry, 1, self._entry, fused=False))

    def _walk(self, name: str, count: int, schedule: str, fused: bool) -> Iterator[Visit]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield Visit(instruction, computation, count, schedule, fused)
            for inner, times in self._called(instruction, computation):
                inside = fused or instruction.opcode == "fusion"
                yield from self._walk(inner, count * times, schedule if inside else inner, inside)

    def _called(
        self, instruction: Instruction, computation: Computation
    ) -> Iterator[tuple[str, int]]:
        if instruction.opcode == "while":
            times = self.trips(instruction, computation)
            yield instruction.called("body") or "", 1 if times is None else times
        elif instruction.opcode == "conditional":
            branches = _BRANCHES.search(instruction.text)
            names = _OPERAND.findall(branches.group(1)) if branches else []
            for name in names or _CALLED.findall(instruction.text):
                yield name, 1
        elif instruction.opcode in ("fusion", "call", "async-start"):
            name = instruction.called("calls") or instruction.called("to_apply")
            if name is not None:
                yield name, 1

    def turn(self) -> Module:
        """The body of the outermost loop whose end depends on data, as a program.

        Raises:
          ValueError: there is no such loop.
        """
        for visit in self.visits:
            loop = visit.instruction
            if loop.opcode == "while" and self.trips(loop, visit.computation) is None:
                inner = copy.copy(self)
                inner.__dict__.pop("visits")
                inner._entry = loop.called("body") or ""
                return inner
        raise ValueError("the program has no loop whose end depends on data")

    def trips(self, loop: Instruction, computation: Computation) -> int | None:
        """Turns of a while loop that counts up to a constant; None where that is not seen."""
        known = _TRIPS.search(loop.text)
        if known:
            return int(known.group(1))
        condition = self.computations[loop.called("condition") or ""]
        root = next(x for x in condition.values() if x.is_root)
        if root.opcode == "fusion":  # its operands keep the names that the fusion's parameters lose
            inner = self.computations[root.called() or ""]
            compare = next((x for x in inner.values() if x.is_root), root)
        else:
            compare = root
        limits = [c for c in map(_constant, map(condition.get, root.operands)) if c is not None]
        if compare.opcode != "compare" or "direction=LT" not in compare.text or len(limits) != 1:
            return None
        counters = [condition.get(name) for name in root.operands]
        indices = [_index(x) for x in counters if x is not None and _index(x) is not None]
        first, step = 0, 1
        if indices and indices[0] is not None:
            first = _constant(self._element(computation, loop.operands[0], indices[0])) or 0
            step = self._step(self.computations[loop.called("body") or ""], indices[0])
        return max(0, -((first - limits[0]) // step))

    def _step(self, body: Computation, index: int) -> int:
        root = next(x for x in body.values() if x.is_root)
        update = self._element(body, root.name, index)
        if update is None or update.opcode != "add":
            return 1
        return next((c for c in map(_constant, map(body.get, update.operands)) if c), 1)

    def _element(self, computation: Computation, name: str, index: int) -> Instruction | None:
        made = computation.get(name)
        if made is None or made.opcode != "tuple":
            return None
        found = computation.get(made.operands[index])
        while found is not None and found.opcode == "copy":
            found = computation.get(found.operands[0])
        return found

    def arrays(self) -> Iterator[tuple[Instruction, Shape]]:
        """Every array that is in memory while the program runs."""
        for visit in self.visits:
            if not visit.fused:
                for shape in visit.instruction.shapes:
                    yield visit.instruction, shape


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    value = re.match(r"(-?\d+)\)", instruction.text)
    return int(value.group(1)) if value else None


def _index(instruction: Instruction) -> int | None:
    found = re.search(r"\bindex=(\d+)", instruction.text)
    return int(found.group(1)) if instruction.opcode == "get-tuple-element" and found else None
