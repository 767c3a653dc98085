"""Depth does not grow the program: 48 layers compile to what 12 do."""

import time

import pytest

from experiments.benchmarks.programs import PROGRAMS, size
from tests.model import small

LAYOUTS = [*(pytest.param(s, marks=pytest.mark.slow) for s in ("mha", "fusedkv_lite")), "fusedkv"]


def lowered(spec, program, depth, **changes):
    config = small.config(spec, num_layers=depth, d_model=16, d_ff=16, **changes)
    return PROGRAMS[program](config)


@pytest.mark.parametrize("program", list(PROGRAMS))
@pytest.mark.parametrize("spec", LAYOUTS)
def test_traced_program_does_not_grow(spec, program):
    shallow, deep = (len(lowered(spec, program, depth).as_text()) for depth in (12, 48))
    assert deep <= 1.2 * shallow


def test_an_unrolled_program_does_grow():
    """The measure of the other tests sees layers that are not scanned."""
    shallow, deep = (
        len(lowered("mha", "decode loop", depth, scan_layers=False).as_text()) for depth in (4, 16)
    )
    assert deep > 2 * shallow


@pytest.mark.parametrize(
    "spec, program",
    [
        ("fusedkv", "decode loop"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("mha", "decode loop"),
                ("fusedkv_lite", "decode loop"),
                ("fusedkv", "train step"),
            )
        ),
    ],
)
def test_compiled_program_does_not_grow(spec, program, fresh_compilation):
    sizes, seconds = {}, {}
    for depth in (12, 48):
        found = lowered(spec, program, depth)
        start = time.process_time()
        sizes[depth] = size(found.compile())
        seconds[depth] = time.process_time() - start
    assert sizes[12] > 500
    assert sizes[48] <= 1.2 * sizes[12]
    assert seconds[48] <= 2 * seconds[12]  # about equal; other programs disturb the clock
