"""What a program sends, against sums by hand and against a program whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from fusedkv_jax.compile_ahead import collectives, work
from fusedkv_jax.compile_ahead.collectives import Collective
from fusedkv_jax.compile_ahead.hlo import Module
from tests.compile_ahead.program import TEXT


def test_by_hand():
    gather, reduce = collectives.collectives(Module(TEXT), 8)
    assert gather == Collective("all-gather", 4, 32 * 4 * 4 * 3 / 4, (0, 1, 2, 3))
    assert reduce == Collective("all-reduce", 1, 2 * 8 * 4 * 4 / 2, (0, 4))


def entry(*lines, computations=""):
    body = "\n".join(f"  {line}" for line in lines)
    return f"{computations}\nENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def only(text, devices=8):
    (one,) = collectives.collectives(Module(text), devices)
    return one


@pytest.mark.parametrize(
    ("groups", "group"),
    [
        ("replica_groups={}", tuple(range(8))),
        ("replica_groups={{1,3},{0,2}}", (1, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4)),
    ],
)
def test_groups_in_every_spelling(groups, group):
    text = entry(
        "%x = f32[8]{0} parameter(0)",
        f"ROOT %y = f32[8]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add",
    )
    assert only(text).group == group


def test_pairs_of_a_permute_and_its_asynchronous_form():
    text = entry(
        "%x = f32[8]{0} parameter(0)",
        "%start = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), "
        "channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}",
        "ROOT %done = f32[8]{0} collective-permute-done(%start)",
    )
    assert only(text) == Collective("collective-permute", 1, 32, (0, 1, 2, 3))


def test_an_asynchronous_gather_is_counted_once():
    text = entry(
        "%x = f32[8]{0} parameter(0)",
        "%start = (f32[8]{0}, f32[16]{0}) all-gather-start(%x), channel_id=1, "
        "replica_groups=[4,2]<=[8], dimensions={0}",
        "ROOT %done = f32[16]{0} all-gather-done(%start)",
    )
    assert only(text) == Collective("all-gather", 1, 16 * 4 / 2, (0, 1))


def test_a_chain_of_fusions_is_one_gather_and_a_sliced_sum_is_a_scatter():
    gather = (
        "%w.{0} = f32[64]{{0}} all-gather(%p.{0}), channel_id=7, "
        "replica_groups=[1,8]<=[8], dimensions={{0}}"
    )
    parts = "".join(
        f"%part.{i} (p.{i}: f32[8]) -> f32[64] {{\n  %p.{i} = f32[8]{{0}} parameter(0)\n"
        f"  ROOT {gather.format(i)}\n}}\n\n"
        for i in range(3)
    )
    scatter = (
        "%scattered (s: f32[64]) -> f32[8] {\n  %s = f32[64]{0} parameter(0)\n"
        "  %all = f32[64]{0} all-reduce(%s), channel_id=8, replica_groups=[1,8]<=[8]\n"
        "  %id = u32[] partition-id()\n"
        "  ROOT %own = f32[8]{0} dynamic-slice(%all, %id), dynamic_slice_sizes={8}\n}\n\n"
    )
    calls = [f"%y.{i} = f32[64]{{0}} fusion(%x), kind=kCustom, calls=%part.{i}" for i in range(3)]
    text = entry(
        "%x = f32[8]{0} parameter(0)",
        *calls,
        "ROOT %z = f32[8]{0} fusion(%y.2), kind=kCustom, calls=%scattered",
        computations=parts + scatter,
    )
    one, other = collectives.collectives(Module(text), 8)
    assert one == Collective("all-gather", 1, 256 * 7 / 8, tuple(range(8)))
    assert other == Collective("reduce-scatter", 1, 256 * 7 / 8, tuple(range(8)))


def test_layers_of_a_real_program_are_gathered_one_by_one():
    """Rows over 8 devices, and weights split over them: 3 layers gather one matrix each."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, size, layers = 64, 48, 3

    def apply(x, weights):
        def layer(x, w):
            x = jnp.tanh(x @ jax.lax.with_sharding_constraint(w, P()))
            return jax.lax.with_sharding_constraint(x, P("fsdp")), None

        return jax.lax.scan(layer, x, weights)[0]

    def spec(part, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, part))

    arguments = spec(P("fsdp"), rows, size), spec(P(None, "fsdp"), layers, size, size)
    with jax.set_mesh(mesh):
        compiled = jax.jit(apply).lower(*arguments).compile()
    module = Module(compiled.as_text())
    found = collectives.collectives(module, 8)
    assert {one.kind for one in found} == {"all-gather"}
    assert sum(one.count for one in found) == layers
    assert sum(one.count * one.nbytes for one in found) == layers * size * size * 4 * 7 / 8
    assert work.matrix_flops(module) == layers * 2 * rows / 8 * size * size
