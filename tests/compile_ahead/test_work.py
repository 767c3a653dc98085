"""FLOPs and bytes of instructions, against sums by hand."""

import jax
import jax.numpy as jnp
import pytest

from fusedkv_jax.compile_ahead import work
from fusedkv_jax.compile_ahead.hlo import Module
from tests.compile_ahead.program import TEXT
from tests.compile_ahead.test_collectives import entry


def test_products_count_as_often_as_their_loop_turns():
    assert work.matrix_flops(Module(TEXT)) == 4 * 2 * 8 * 8 * 4


@pytest.mark.parametrize("stride, padding", [(1, "SAME"), (2, "VALID"), (1, [(3, 0)])])
def test_convolutions_count_what_lies_inside(stride, padding):
    """Against the compiler's own analysis, where there is no loop."""

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride,), padding, dimension_numbers=("NWC", "WIO", "NWC")
        )

    shapes = jax.ShapeDtypeStruct((2, 16, 8), jnp.float32), jax.ShapeDtypeStruct((5, 8, 4), "f4")
    compiled = jax.jit(convolve).lower(*shapes).compile()
    assert work.matrix_flops(Module(compiled.as_text())) == compiled.cost_analysis()["flops"]


def kernel(name, operands, shape):
    return f'%{name} = {shape} custom-call({operands}), custom_call_target="tpu_custom_call"'


def test_attention_kernels_by_their_shapes():
    text = entry(
        "%m = s32[] parameter(0)",
        "%q = bf16[2,4,3,16,64]{4,3,2,1,0} parameter(1)",
        "%k = bf16[2,4,48,64]{3,2,1,0} parameter(2)",
        kernel("tile_forward.2", "%m, %q, %k, %k", "bf16[2,4,3,16,64]{4,3,2,1,0}"),
        "ROOT " + kernel("tile_backward.7", "%m, %k, %q, %k", "bf16[2,4,3,16,64]{4,3,2,1,0}"),
    )
    module = Module(text)
    pairs = 2 * 4 * 48 * 48
    assert work.attention_flops(module, 0.5) == (2 + 5) * 2 * pairs * 64 / 2
    assert work.kernel_calls(module) == {"tile_forward": 1, "tile_backward": 1}


def test_keys_and_values_of_other_sizes_count_in_their_own_products():
    """Multi-head latent attention; the backward kernel gets gradients of outputs before queries."""
    text = entry(
        "%do = bf16[2,4,3,16,128]{4,3,2,1,0} parameter(0)",
        "%q = bf16[2,4,3,16,192]{4,3,2,1,0} parameter(1)",
        "%k = bf16[2,4,48,192]{3,2,1,0} parameter(2)",
        "%v = bf16[2,4,48,128]{3,2,1,0} parameter(3)",
        kernel("tile_forward.2", "%k, %q, %v", "bf16[2,4,3,16,128]{4,3,2,1,0}"),
        "ROOT " + kernel("tile_backward.7", "%do, %k, %q, %v", "bf16[2,4,3,16,192]{4,3,2,1,0}"),
    )
    pairs = 2 * 4 * 48 * 48
    forward, backward = 192 + 128, 3 * 192 + 2 * 128
    assert work.attention_flops(Module(text), 1.0) == 2 * pairs * (forward + backward)


def test_memory_is_read_in_slices_and_never_for_what_is_on_the_chip():
    fusion = (
        "%copied (s: f32[10,8]) -> f32[10,8] {\n  %s = f32[10,8]{1,0} parameter(0)\n"
        "  ROOT %c = f32[10,8]{1,0} copy(%s)\n}\n"
        "%sliced (stack: f32[10,8], i: s32[], near: f32[8]) -> f32[8] {\n"
        "  %stack = f32[10,8]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  %near = f32[8]{0:S(1)} parameter(2)\n"
        "  %tiled = f32[10,8]{1,0} fusion(%stack), output_to_operand_aliasing={{}: (0, {})}, "
        "kind=kLoop, calls=%copied\n"
        "  %row = f32[1,8]{1,0} dynamic-slice(%tiled, %i, %i), dynamic_slice_sizes={1,8}\n"
        "  %flat = f32[8]{0} bitcast(%row)\n"
        "  ROOT %total = f32[8]{0} add(%flat, %near)\n}\n"
    )
    text = entry(
        "%stack.1 = f32[10,8]{1,0} parameter(0)",
        "%i.1 = s32[] parameter(1)",
        "%near.1 = f32[8]{0:S(1)} parameter(2)",
        "ROOT %y = f32[8]{0} fusion(%stack.1, %i.1, %near.1), kind=kLoop, calls=%sliced",
        computations=fusion,
    )
    assert work.hbm_bytes(Module(text)) == 8 * 4 + 4 + 8 * 4  # a row, its number, the result


def test_a_fusion_within_a_fusion_reads_slices_too():
    fusions = (
        "%handed (u: f32[10,8]) -> f32[10,8] {\n  %u = f32[10,8]{1,0} parameter(0)\n"
        "  ROOT %b = f32[10,8]{1,0} bitcast(%u)\n}\n"
        "%slices (j: s32[], t: f32[10,8]) -> f32[1,8] {\n  %j = s32[] parameter(0)\n"
        "  %t = f32[10,8]{1,0} parameter(1)\n"
        "  ROOT %r = f32[1,8]{1,0} dynamic-slice(%t, %j, %j), dynamic_slice_sizes={1,8}\n}\n"
        "%doubled (w: f32[10,8], i: s32[]) -> f32[1,8] {\n"
        "  %w = f32[10,8]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  %same = f32[10,8]{1,0} fusion(%w), kind=kLoop, calls=%handed\n"
        "  %row = f32[1,8]{1,0} fusion(%i, %same), kind=kLoop, calls=%slices\n"
        "  ROOT %d = f32[1,8]{1,0} add(%row, %row)\n}\n"
    )
    text = entry(
        "%w.1 = f32[10,8]{1,0} parameter(0)",
        "%i.1 = s32[] parameter(1)",
        "ROOT %y = f32[1,8]{1,0} fusion(%w.1, %i.1), kind=kOutput, calls=%doubled",
        computations=fusions,
    )
    assert work.hbm_bytes(Module(text)) == 8 * 4 + 4 + 8 * 4


def test_a_gather_that_runs_beside_a_product_is_not_its_memory_traffic():
    fusion = (
        "%beside (p: f32[4], whole: f32[64], x: f32[8]) -> (f32[8], f32[4], f32[64], f32[64]) {\n"
        "  %p = f32[4]{0} parameter(0)\n  %whole = f32[64]{0} parameter(1)\n"
        "  %x = f32[8]{0} parameter(2)\n  %y = f32[8]{0} add(%x, %x)\n"
        "  %g = f32[64]{0} all-gather(%p), channel_id=1, replica_groups={}, dimensions={0}\n"
        "  ROOT %t = (f32[8]{0}, f32[4]{0}, f32[64]{0}, f32[64]{0}) tuple(%y, %p, %whole, %g)\n}\n"
    )
    text = entry(
        "%p.1 = f32[4]{0} parameter(0)",
        "%whole.1 = f32[64]{0} parameter(1)",
        "%x.1 = f32[8]{0} parameter(2)",
        "ROOT %y.1 = (f32[8]{0}, f32[4]{0}, f32[64]{0}, f32[64]{0}) fusion(%p.1, %whole.1, %x.1), "
        "kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {})}, "
        "calls=%beside",
        computations=fusion,
    )
    assert work.hbm_bytes(Module(text)) == 8 * 4 + 8 * 4  # x and y


@pytest.mark.parametrize("near, moved", [("", 2 * 10 * 4), (":S(1)", 10 * 4)])
def test_an_asynchronous_slice_moves_what_it_slices(near, moved):
    text = entry(
        "%x = f32[100]{0} parameter(0)",
        f"%s = ((f32[100]{{0}}), f32[10]{{0{near}}}, s32[]) slice-start(%x), slice={{[0:10]}}",
        f"ROOT %y = f32[10]{{0{near}}} slice-done(%s)",
    )
    assert work.hbm_bytes(Module(text)) == moved


@pytest.mark.parametrize(
    "source, target, moved",
    [("", "", 2 * 32), ("", ":S(1)", 32), (":S(1)", "", 32), (":S(1)", ":S(1)", 0)],
)
def test_a_copy_to_or_from_the_chip_moves_its_bytes_once(source, target, moved):
    there, here = f"f32[8]{{0{source}}}", f"f32[8]{{0{target}}}"
    text = entry(
        f"%x = {there} parameter(0)",
        f"%c = ({here}, {there}, u32[]{{:S(2)}}) copy-start(%x)",
        f"ROOT %y = {here} copy-done(%c)",
    )
    assert work.hbm_bytes(Module(text)) == moved


def test_an_asynchronous_gather_reads_its_part_and_writes_the_whole():
    text = entry(
        "%p = f32[4]{0} parameter(0)",
        "%g = (f32[4]{0}, f32[64]{0}) all-gather-start(%p), replica_groups={}, dimensions={0}",
        "ROOT %y = f32[64]{0} all-gather-done(%g)",
    )
    assert work.hbm_bytes(Module(text)) == (4 + 64) * 4


@pytest.mark.parametrize(
    "update",
    [
        "dynamic-update-slice(%stack, %row, %i, %i)",
        "scatter(%stack, %i, %row), to_apply=%add",
    ],
)
def test_an_update_in_place_writes_only_what_changes(update):
    text = entry(
        "%stack = f32[10,8]{1,0} parameter(0)",
        "%row = f32[1,8]{1,0} parameter(1)",
        "%i = s32[] parameter(2)",
        f"ROOT %y = f32[10,8]{{1,0}} {update}",
    )
    assert work.hbm_bytes(Module(text)) == 2 * 8 * 4
