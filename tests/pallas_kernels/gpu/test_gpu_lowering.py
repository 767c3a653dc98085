"""Calls lower for CUDA on a machine without a GPU, with the kernels that they should launch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import gpu, mosaic_gpu
from pallas_kernels.gpu import workloads
from tests.pallas_kernels.cases import call_of
from tests.pallas_kernels.gpu.toolchain import H100, needs_toolchain

pytestmark = needs_toolchain

SMALL = functools.partial(workloads.Workload, keys=256, size=16)
CALLS = {
    "forward": (SMALL(name="", length=256), 1),
    "backward": (SMALL(name="", length=256, grad=True), 3),
    "decode": (SMALL(name="", length=1), 2),
    "pages": (SMALL(name="", length=1, paged=True), 2),
    "pages_int8": (SMALL(name="", length=1, paged=True, storage="int8"), 2),
    "step_int8": (SMALL(name="", length=8, ragged=True, storage="int8"), 2),
    "int8_prefill": (SMALL(name="", length=256, storage="int8"), 1),
}


def lowered(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def kernels(function, *arguments):
    return lowered(function, *arguments).count("@triton_kernel_call")


@pytest.mark.parametrize("name", CALLS)
def test_a_call_lowers_to_its_kernels(name):
    call, count = CALLS[name]
    assert kernels(functools.partial(workloads.trace, call, H100)) == count


def test_training_on_hopper_lowers_to_its_kernel_and_to_tritons_gradients():
    made = workloads.sequence(SMALL(name="", length=256, size=64))

    def step(q, sources):
        def attend(q, sources):
            call = dataclasses.replace(made, q=q, sources=sources)
            return mosaic_gpu.attention(call, device=H100)

        out, pull = jax.vjp(attend, q, sources)
        return pull(out)

    text = lowered(step, made.q, made.sources)
    assert text.count("@mosaic_gpu_v2") == 1 and text.count("@triton_kernel_call") == 2


def test_kernels_lower_inside_shard_map():
    """The batch split over two devices: each launches the kernels on its half."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("batch",), auto, devices=jax.devices()[:2])

    def shard(q, source):
        call = call_of((q, (source,), (source,), None, None), {"scale": 0.25})
        return gpu.attention(call, device=H100)

    mapped = jax.shard_map(
        shard, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"), check_vma=False
    )
    q = jax.ShapeDtypeStruct((4, 1, 8, 16), jnp.bfloat16)
    source = jax.ShapeDtypeStruct((4, 256, 2, 16), jnp.bfloat16)
    assert kernels(mapped, q, source) == 2
