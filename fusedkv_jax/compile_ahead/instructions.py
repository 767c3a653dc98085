"""One line of the text of a compiled XLA program."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_BITS = re.compile(r"^[a-z]+(\d+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's type.

    Attributes:
      dtype: XLA's name of it, such as "bf16".
      dims: sizes.
      on_chip: it is in a core's own memory (VMEM, SMEM), not in HBM.
    """

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def nbytes(self) -> float:
        """Bytes without padding."""
        if self.dtype == "pred":
            return self.elements
        bits = _BITS.match(self.dtype)
        return self.elements * int(bits.group(1)) / 8 if bits else 0  # tokens have none


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: of the result, without the percent sign.
      opcode: such as "all-gather-start".
      shapes: of the result; several of a tuple, nested ones flattened.
      operands: names of the arguments, all in the same computation.
      text: the argument list, then everything after it, as written.
      is_root: the result of its computation.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool

    def called(self, kind: str = "calls") -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{kind}=%?([\w.\-]+)", self.text)
        return found.group(1) if found else None


def parse_instruction(line: str) -> Instruction | None:
    """One line of a computation; None where it is none."""
    name = _NAME.match(line)
    if name is None:
        return None
    rest = line[name.end() :]
    kind, rest = _type(rest)
    opcode, _, text = rest.partition("(")
    inside = text[: _closing("(" + text) - 1]
    return Instruction(
        name.group(2),
        opcode.strip(),
        tuple(parse_shapes(kind)),
        tuple(_OPERAND.findall(inside)),
        text,
        bool(name.group(1)),
    )


def parse_shapes(text: str) -> Iterator[Shape]:
    """The array types in some text."""
    for dtype, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(size) for size in dims.split(",") if size)
        yield Shape(dtype, sizes, bool(re.search(r"S\([1-9]", layout)))


def _type(text: str) -> tuple[str, str]:
    """Splits what begins with a type behind it."""
    if text.startswith("("):
        end = _closing(text) + 1
        return text[:end], text[end:]
    kind, _, rest = text.partition(" ")
    return kind, rest


def _closing(text: str) -> int:
    """Place of the parenthesis that closes the one which begins the text."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match.group() == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")
