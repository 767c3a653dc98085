"""What a chip computes and reads in one run of a compiled program."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from fusedkv_jax.compile_ahead.collectives import KINDS
from fusedkv_jax.compile_ahead.hlo import Computation, Module
from fusedkv_jax.compile_ahead.instructions import Instruction, Shape

_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_KERNELS = re.compile("tile_forward|tile_backward|decode")
_PASSIVE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "async-start", "after-all", "partition-id", "replica-id", "iota",
}  # fmt: skip

_ALIASES = re.compile(r"\{(\d+)\}: \((\d+), \{")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # in place; which operand has the new values


def matrix_flops(module: Module) -> float:
    """FLOPs of matrix products and convolutions, recomputation included; 2 a multiply-add."""
    total = 0.0
    for visit in module.visits:
        if visit.instruction.opcode in ("dot", "convolution"):
            total += visit.count * _product(visit.instruction, visit.computation)
    return total


def attention_flops(module: Module, visible: float) -> float:
    """FLOPs of the attention kernels for many queries, which XLA does not look into.

    Two products of all query-key pairs in the forward, five in the backward kernel; of keys or
    values, whose heads may differ in size.

    Args:
      module: the program.
      visible: fraction of the pairs that the mask leaves; the kernels skip the others.
    """
    total = 0.0
    for visit in module.visits:
        kernel = _kernel(visit.instruction)
        if kernel not in ("tile_forward", "tile_backward"):
            continue
        shapes = [_shape(visit.computation, name) for name in visit.instruction.operands]
        # Queries, or gradients of outputs, [B, K, blocks, rows, H]; keys, then values [B, K, S, H].
        queries = next(s for s in shapes if len(s.dims) == 5 and s.dims[4] > 1 and s.dims[3] > 1)
        stored = [s for s in shapes if len(s.dims) == 4 and s.dims[:2] == queries.dims[:2]]
        size, value_size = stored[0].dims[3], stored[-1].dims[3]
        channels = size + value_size if kernel == "tile_forward" else 3 * size + 2 * value_size
        pairs = queries.elements // queries.dims[4] * stored[0].dims[2] * visible
        total += visit.count * 2 * pairs * channels
    return total


def kernel_calls(module: Module) -> dict[str, int]:
    """How often each Pallas kernel runs."""
    calls: dict[str, int] = {}
    for visit in module.visits:
        kernel = _kernel(visit.instruction)
        if kernel:
            calls[kernel] = calls.get(kernel, 0) + visit.count
    return calls


def hbm_bytes(module: Module) -> float:
    """Bytes that instructions read from HBM and write to it.

    A fusion reads of an argument only what it slices from it, and writes of a result that it
    updates only what changes. Kernels count their arguments and results once; decoding kernels,
    which read no more of the cache than rows hold, not at all.
    """
    total = 0.0
    for visit in module.visits:
        if not visit.fused and visit.instruction.opcode not in _PASSIVE:
            total += visit.count * _traffic(module, visit.instruction, visit.computation)
    return total


def _kernel(instruction: Instruction) -> str | None:
    if 'custom_call_target="tpu_custom_call"' not in instruction.text:
        return None
    # Autodiff puts its own words around the name: %jvp_tile_forward_.1.
    named = _KERNELS.search(instruction.name)
    return named.group() if named else re.sub(r"[.\d]+$", "", instruction.name)


def _shape(computation: Computation, name: str) -> Shape:
    made = computation.get(name)
    return made.shapes[0] if made is not None and len(made.shapes) == 1 else Shape("token", ())


def _product(instruction: Instruction, computation: Computation) -> float:
    left, right = (_shape(computation, name).dims for name in instruction.operands[:2])
    (out,) = instruction.shapes[:1]
    if instruction.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        axes = [int(n) for n in found.group(1).split(",") if n] if found else []
        return 2.0 * out.elements * math.prod(left[axis] for axis in axes)
    labels = _LABELS.search(instruction.text)
    assert labels is not None, instruction
    of_left, of_right, of_out = labels.groups()
    flops = 2.0 * right[of_right.index("i")]
    flops *= out.dims[of_out.index("b")] * out.dims[of_out.index("f")]
    window = _window(instruction.text, len(out.dims) - 2)
    for axis, (stride, low, dilation, kernel_dilation) in enumerate(window):
        sizes = (out.dims[of_out.index(str(axis))], right[of_right.index(str(axis))])
        last = (left[of_left.index(str(axis))] - 1) * dilation
        places = np.arange(sizes[0])[:, None] * stride - low
        places = places + np.arange(sizes[1]) * kernel_dilation
        flops *= np.count_nonzero((places >= 0) & (places <= last) & (places % dilation == 0))
    return flops


def _window(text: str, axes: int) -> list[tuple[int, int, int, int]]:
    """Per spatial axis: stride, padding before, dilation of the input and of the kernel."""
    found = _WINDOW.search(text)
    fields = dict(f.split("=") for f in found.group(1).split()) if found else {}

    def sizes(name: str, default: str) -> list[int]:
        parts = fields[name].split("x") if name in fields else [default] * axes
        return [int(part.split("_")[0]) for part in parts]

    names = (("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))
    return list(zip(*(sizes(*name) for name in names), strict=True))


def _traffic(module: Module, instruction: Instruction, computation: Computation) -> float:
    kernel, opcode = _kernel(instruction), instruction.opcode
    if kernel is not None and kernel.startswith("decode"):
        return 0.0
    if opcode == "custom-call" and kernel is None:
        return 0.0  # markers of asynchronous operations
    if opcode.endswith("-done"):
        return 0.0
    inputs = [_shape(computation, name) for name in instruction.operands]
    outputs = _results(instruction)
    if opcode.removesuffix("-start") in ("copy", "dynamic-slice", "slice", "gather"):
        return sum(s.nbytes for s in outputs) * (not inputs[0].on_chip) + _in_hbm(outputs)
    if opcode in _UPDATES:
        changed = inputs[_UPDATES[opcode]]
        return _in_hbm([changed]) + changed.nbytes * (not inputs[0].on_chip)
    if opcode == "fusion":
        inner = module.computations[instruction.called() or ""]
        return _fusion_traffic(module, instruction, inner, inputs)
    return _in_hbm(inputs) + _in_hbm(outputs)


def _in_hbm(shapes: Iterable[Shape]) -> float:
    return sum(s.nbytes for s in shapes if not s.on_chip)


def _results(instruction: Instruction) -> Sequence[Shape]:
    """What an instruction makes, without what else an asynchronous one hands to its end."""
    opcode, shapes = instruction.opcode, instruction.shapes
    if opcode in ("slice-start", "dynamic-slice-start", "collective-permute-start"):
        return shapes[1:2]  # after the argument
    if opcode == "all-gather-start":
        return shapes[len(shapes) // 2 :]  # (arguments, results)
    if opcode == "copy-start":
        return shapes[:1]  # before the argument
    return shapes


def _fusion_traffic(
    module: Module, fusion: Instruction, inner: Computation, inputs: list[Shape]
) -> float:
    arguments, results = _under_way(fusion, inner)
    total = 0.0
    for instruction in inner.values():
        if instruction.opcode != "parameter":
            continue
        number = int(instruction.text.split(")")[0])
        if number < len(inputs) and not inputs[number].on_chip and number not in arguments:
            total += _read(module, inner, instruction)
    root = next(x for x in inner.values() if x.is_root)
    written = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for number, (value, shape) in enumerate(zip(written, fusion.shapes, strict=False)):
        if not shape.on_chip and number not in results:
            total += _changed(inner, value)
    return total


def _under_way(fusion: Instruction, inner: Computation) -> tuple[set[int], set[int]]:
    """Arguments and results that a fusion hands on for a collective which runs beside it."""
    if not any(x.opcode.removesuffix("-start") in KINDS for x in inner.values()):
        return set(), set()
    pairs = _ALIASES.findall(fusion.text.partition("output_to_operand_aliasing=")[2])
    return {int(argument) for _, argument in pairs}, {int(result) for result, _ in pairs}


def _read(module: Module, inner: Computation, value: Instruction) -> float:
    """What a fusion reads of an argument."""
    total, size = 0.0, sum(s.nbytes for s in value.shapes)
    for user in inner.values():
        if value.name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            total += user.shapes[0].nbytes
        elif _is_same(user):
            total += _read(module, inner, user)
        elif user.opcode == "fusion":  # a fusion within one: slices of stacked weights, say
            called = module.computations[user.called() or ""]
            for number, name in enumerate(user.operands):
                if name == value.name:
                    inside = _parameter(called, number)
                    total += _read(module, called, inside)
                    if _origin(called, next(x for x in called.values() if x.is_root)) is inside:
                        total += _read(module, inner, user)  # it only hands the value on
        elif user.opcode not in _UPDATES or user.operands[0] != value.name:
            return size
    return min(total, size)


def _parameter(computation: Computation, number: int) -> Instruction:
    return next(
        x
        for x in computation.values()
        if x.opcode == "parameter" and int(x.text.split(")")[0]) == number
    )


def _is_same(value: Instruction) -> bool:
    """A value in another form; also tiled anew in place, as compilers for newer chips do."""
    return (
        value.opcode in ("bitcast", "copy")
        or value.opcode == "fusion"
        and "output_to_operand_aliasing" in value.text
    )


def _origin(inner: Computation, value: Instruction) -> Instruction:
    """What a value was before it got another form."""
    while _is_same(value):
        value = inner[value.operands[0]]
    return value


def _changed(inner: Computation, value: Instruction) -> float:
    """What a fusion writes of a result."""
    value = _origin(inner, value)
    if value.opcode in _UPDATES:
        return inner[value.operands[_UPDATES[value.opcode]]].shapes[0].nbytes
    return sum(s.nbytes for s in value.shapes)
