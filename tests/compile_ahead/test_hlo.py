"""Programs written by hand: what runs, how often, and where results are."""

import pytest

from fusedkv_jax.compile_ahead import hlo
from fusedkv_jax.compile_ahead.instructions import parse_instruction
from tests.compile_ahead.program import TEXT


@pytest.fixture(scope="module")
def module():
    return hlo.Module(TEXT)


def test_types_with_layouts_tuples_and_comments_are_read():
    made = parse_instruction(
        "  ROOT %start.1 = (bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[], s4[5]{0}, token[])"
        ' custom-call(%x.1, /*index=1*/%y), custom_call_target="f(%z)"'
    )
    assert made is not None
    assert (made.name, made.opcode, made.is_root) == ("start.1", "custom-call", True)
    assert made.operands == ("x.1", "y")
    assert [shape.dims for shape in made.shapes] == [(2, 3), (), (5,), ()]
    assert [shape.nbytes for shape in made.shapes] == [12, 1, 2.5, 0]
    assert [shape.on_chip for shape in made.shapes] == [True, False, False, False]


def test_bodies_of_loops_run_as_often_as_the_loops_turn(module):
    counts = {v.instruction.name: v.count for v in module.visits}
    assert counts["multiplied"] == 4  # from 1 to 9 in steps of 2
    assert counts["doubled"] == 4 * 3  # whose loop the compiler has counted
    assert counts["unknown_body_root"] == 4  # its end depends on data: once each time
    assert counts["top"] == 1


def test_only_what_is_outside_of_fusions_is_in_memory(module):
    names = {instruction.name for instruction, _ in module.arrays()}
    assert "scaled" in names and "inside" not in names
    assert next(v for v in module.visits if v.instruction.name == "inside").fused


def test_a_turn_of_a_loop_without_a_known_end(module):
    assert [v.instruction.name for v in module.turn().visits][-1] == "unknown_body_root"
    with pytest.raises(ValueError, match="no loop"):
        module.turn().turn()
