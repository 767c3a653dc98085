"""The shared tests on the kernels in Triton's interpreter; see `test_interpreted.py`.

Kernels get block sizes so small that most cases have several tiles, splits and row blocks.
"""

import dataclasses

import jax
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.gpu import blocks
from tests.oracles import attention as oracle
from tests.pallas_kernels import fuzz
from tests.pallas_kernels.attention_cases import AttentionCases
from tests.pallas_kernels.cases import (
    CASES,
    call_of,
    close,
    draw,
    paged_call_of,
    poison,
    ragged_call_of,
)
from tests.pallas_kernels.fuzz_ragged import ragged
from tests.pallas_kernels.gpu.interpreter import INTERPRETER
from tests.pallas_kernels.implementation import Implementation
from tests.pallas_kernels.ragged_cases import RaggedKernelCases
from tests.pallas_kernels.stored_cases import PagedCases, QuantizedCases

SMALL = blocks.BlockSizes(rows=16, keys=16, warps=4, stages=1)

# Of NumPy, about how the interpreter uses it; infinity - infinity in what is then masked.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array", "ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    def choose(kernel, device, call):
        fitting = 16 if call.rows <= 16 else 32 if call.rows <= 32 else 64
        return dataclasses.replace(SMALL, rows=fitting if kernel == "decode" else 16)

    monkeypatch.setattr(blocks, "choose", choose)


class Triton(Implementation):
    implementation = "triton"
    unsupported = frozenset({"float8_e4m3b11fnuz", "int4"})
    narrow = "float16"  # the interpreter computes bfloat16 wrong

    def attend(self, arguments, options):
        return gpu.attention(call_of(arguments, options), device=INTERPRETER)

    def attend_pages(self, *arguments):
        *arguments, options = arguments
        return gpu.paged_attention(paged_call_of(*arguments, **options), device=INTERPRETER)

    def attend_ragged(self, *arguments):
        *arguments, options = arguments
        return gpu.ragged_attention(ragged_call_of(*arguments, **options), device=INTERPRETER)


class TestTriton(Triton, AttentionCases):
    examples = 3


COMMITTED = sorted({(x["kernel"], x["rows"], x["keys"]) for x in blocks.table()})


class TestCommittedBlocks(Triton):
    """A case with each block size of the table, and one of the most that the kernels hold."""

    @pytest.mark.parametrize("kernel, rows, keys", COMMITTED)
    def test_gives_right_results(self, monkeypatch, kernel, rows, keys):
        entry = dataclasses.replace(SMALL, rows=rows, keys=keys)
        others = blocks.choose

        def choose(name, device, call):
            return entry if name == kernel else others(name, device, call)

        monkeypatch.setattr(blocks, "choose", choose)
        name = "two_tokens" if kernel == "decode" else "segments"
        self.check(name, *CASES[name])

    def test_wide_sources_whose_weights_are_read_for_each_tile(self):
        options = {"kv_lengths": np.asarray([35], np.int32)}
        self.check("wide", (1, 20, 40, 2, 1, 160, 160, 4, 4), options)

    def check(self, name, shape, options):
        arguments, cotangents = draw(name, shape)

        def both(arguments, cotangents):
            result, pull = jax.vjp(lambda *x: self.attend(x, options), *arguments)
            return *result, pull(cotangents)

        got = jax.jit(both)(poison(arguments, options), cotangents)
        want = oracle.attention(*arguments, options, *cotangents)
        jax.tree.map(close, got, want)


class TestTritonQuantized(Triton, QuantizedCases):
    pass


class TestTritonPaged(Triton, PagedCases):
    pass


class TestTritonRagged(Triton, RaggedKernelCases):
    ragged = ("lanes", "int8", "tiles")
    examples = 3


SMALL_CALLS = fuzz.Limits(rows=48, numbers=2**13, sizes=(16, 32, 64), keys=96)


@pytest.mark.usefixtures("fresh_compilation")
@pytest.mark.parametrize("form", [fuzz.attention, fuzz.quantized, fuzz.paged, ragged])
def test_random_calls_match_the_definition(form):
    """The interpreter's share of the weekly sample; see `fuzz`."""
    fuzz.run(form, Triton(), SMALL_CALLS, fuzz.share(2))
