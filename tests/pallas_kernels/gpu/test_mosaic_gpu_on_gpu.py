"""The shared tests of the Mosaic GPU kernel on a Hopper GPU, and long calls beside Triton's.

`JAX_PLATFORMS=cuda,cpu python -m pytest tests/pallas_kernels/gpu/test_mosaic_gpu_on_gpu.py`
"""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from tests.pallas_kernels.attention_cases import AttentionCases
from tests.pallas_kernels.cases import as_jax, close, draw
from tests.pallas_kernels.gpu.mosaic_gpu import NEEDS, MosaicGpu, on_hopper

pytestmark = pytest.mark.skipif(not on_hopper(), reason=NEEDS)


class TestMosaicGpu(MosaicGpu, AttentionCases):
    pass


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("sources", [1, 2])
def test_mosaic_gpu_on_long_calls_with_gradients(size, sources):
    """More blocks than multiprocessors, so that tiles and barriers are used again and again."""
    shape = (2, 1500, 1500, 8, 2, size, size, sources, sources)
    (q, keys, values, *weights), (dout, dlse) = draw("long", shape)
    narrow = lambda x: jnp.asarray(x, jnp.bfloat16)  # noqa: E731
    arguments = (*jax.tree.map(narrow, (q, keys, values)), *as_jax(tuple(weights)))

    def run(name, *arguments):
        def attend(*arguments):
            return pallas_kernels.attention(*arguments, return_residuals=True, implementation=name)

        result, pull = jax.vjp(attend, *arguments)
        return result, pull((narrow(dout), as_jax(dlse)))

    found, want = (jax.jit(run, static_argnums=0)(x, *arguments) for x in ("mosaic_gpu", "triton"))
    again = jax.jit(run, static_argnums=0)("mosaic_gpu", *arguments)
    jax.tree.map(lambda x, y: close(x, y, 0), again, found)
    jax.tree.map(lambda x, y: close(x, y, 2e-2), found, want)
