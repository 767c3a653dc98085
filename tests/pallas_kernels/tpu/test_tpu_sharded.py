"""The kernels inside `shard_map`: heads over devices."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import tpu
from pallas_kernels.tpu import topology
from tests.oracles import attention as oracle
from tests.pallas_kernels.cases import I32, call_of, close, draw

HEADS, WEIGHTS = P(None, None, "heads"), P(None, "heads")
SPECS = (HEADS, HEADS, HEADS, WEIGHTS, WEIGHTS, P())


def sharded(mesh, **options):
    """`tpu.attention` with query and KV heads split over the mesh; lengths are everywhere."""

    def attend(q, keys, values, a, b, lengths):
        call = call_of((q, keys, values, a, b), {"kv_lengths": lengths, "scale": 0.25})
        return tpu.attention(call, **options)

    return jax.shard_map(
        attend, mesh=mesh, in_specs=SPECS, out_specs=(HEADS, HEADS), check_vma=False
    )


@pytest.mark.parametrize("queries", [1, 20])
def test_heads_over_devices_give_the_same(queries):
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    lengths = I32([30, 24])
    arguments, _ = draw("sharded", (2, queries, 30, 4, 2, 16, 16, 2, 2))
    want = oracle.attention(*arguments, {"kv_lengths": lengths})
    call = jax.jit(sharded(mesh, chip="v6e", interpret=True))
    got = call(*jax.tree.map(jnp.asarray, (*arguments, lengths)))
    jax.tree.map(close, tuple(got), want[:2])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_compiles_for_four_chips_and_knows_them_by_their_mesh():
    mesh = jax.sharding.Mesh(np.array(topology.devices("v5e")), ("heads",))

    def spec(part, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, part))

    source = spec(HEADS, 2, 2048, 8, 128)
    weights = functools.partial(spec, WEIGHTS, 2, 8, 128, dtype=jnp.float32)
    arguments = (
        spec(HEADS, 2, 1, 32, 128), (source,) * 2, (source,) * 2, weights(), weights(),
        spec(P(), 2, dtype=jnp.int32),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        program = jax.jit(sharded(mesh)).lower(*arguments).compile()
    assert "tpu_custom_call" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 2 * 2048 * 8 * 128 / 4
