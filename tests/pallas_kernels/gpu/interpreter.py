"""Runs kernels in Triton's interpreter, on NumPy arrays, from inside a jitted JAX program.

TRITON_INTERPRET=1 must be in the environment before anything imports triton.
"""

import os
import sys

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
sys.modules.setdefault("torch", None)  # triton imports it if it can, which takes seconds

import jax  # noqa: E402
import numpy as np  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from pallas_kernels.gpu import device  # noqa: E402

_PATCHED: set[str] = set()


def _call(self, *args, **kwargs):
    """A helper called by a kernel: patches what its module sees of triton once, not each time."""
    if self.fn.__module__ not in _PATCHED:
        interpreter._patch_lang(self.fn)
        _PATCHED.add(self.fn.__module__)
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call


def _moved(self, inlineAsm, constraints, values, type, isPure, pack):
    """The only assembly that the kernels have: a move, for the sake of the compiler."""
    assert inlineAsm == "mov.b32 $0, $1;", inlineAsm
    return _Results(values)


class _Results(list):
    """What the interpreter asks of an operation with results."""

    def get_result(self, i):
        return self[i]


interpreter.InterpreterBuilder.create_inline_asm = _moved

_SHORT = {
    "float32": "fp32",
    "float16": "fp16",
    "int8": "i8",
    "int32": "i32",
    "float8_e5m2": "fp8e5",
    "float8_e4m3fn": "fp8e4nv",
}


class Storage:
    """What the interpreter asks of a tensor's memory."""

    def __init__(self, array):
        self.array = array

    def data_ptr(self):
        return self.array.ctypes.data

    def cpu(self):
        return self

    def copy_(self, other):
        """Nothing: the kernel wrote in place."""


class HostArray(Storage):
    """What the interpreter asks of a tensor."""

    dtype = property(lambda self: _SHORT[self.array.dtype.name])

    def untyped_storage(self):
        return Storage(self.array)

    def new_empty(self, *size, **kw):
        return HostArray(self.array)

    def set_(self, storage, offset, size, stride):
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(x // self.array.itemsize for x in self.array.strides)


def launch(name, arguments, out, grid, constants, warps, stages, _):
    """As `device.launch`, in the interpreter; what a kernel does not write is NaN."""
    is_array = [hasattr(x, "shape") for x in arguments]
    arrays = [x for x, yes in zip(arguments, is_array, strict=True) if yes]

    def call(*arrays):
        # Copies: jax may hand out memory that is not aligned, or not contiguous.
        arrays = iter([HostArray(np.array(x, order="C")) for x in arrays])
        inputs = [next(arrays) if yes else x for x, yes in zip(arguments, is_array, strict=True)]
        outputs = [np.full(x.shape, np.nan, x.dtype) for x in out]
        device.kernel(name)[grid](*inputs, *map(HostArray, outputs), **constants)
        return tuple(outputs)

    return jax.pure_callback(call, tuple(out), *arrays)


INTERPRETER = device.GpuTarget(kind="interpreter", cores=4, compute_capability=90, launch=launch)
