"""Nothing of the size of a rebuilt K or V is allocated, by the compiler's own account."""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels.tpu import topology

LENGTH, KV_HEADS, SIZE = 4096, 2, 64


def specs(dtype, layers, sources=2):
    spec = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    side = (spec(1, LENGTH, KV_HEADS, SIZE),) * sources
    weights = spec(layers, 2, KV_HEADS, SIZE, dtype=jnp.float32) if sources > 1 else None
    return spec(layers, 1, LENGTH, 2, SIZE), side, side, weights, weights


def loss(wide, q, keys, values, a, b):
    """Layers that all read the same sources, as the upper half of FusedKV does."""
    if wide:  # as training does: their gradients are then summed in float32
        keys, values = jax.tree.map(lambda x: x.astype(jnp.float32), (keys, values))

    def layer(total, step):
        q, a, b = step
        out = pallas_kernels.attention(q, keys, values, a, b, implementation="xla")
        return total + out.astype(jnp.float32).sum(), None

    return jax.lax.scan(layer, 0.0, (q, a, b))[0]


def temporaries(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("fresh_compilation")
class TestXla:
    ONE = LENGTH * KV_HEADS * SIZE * 4  # one K or V

    def compile(self, function, *shape):
        return temporaries(jax.jit(function).lower(*specs(jnp.float32, *shape)).compile())

    def test_forward_never_holds_a_rebuilt_stream(self):
        plain, fused = (self.compile(lambda *x: loss(False, *x), 2, j) for j in (1, 2))
        assert fused - plain < 0.5 * self.ONE

    def test_backward_holds_nothing_for_each_layer_but_its_output(self):
        gradient = jax.grad(lambda *x: loss(False, *x), (0, 1, 2, 3, 4))
        few, many = (self.compile(gradient, count) for count in (2, 8))
        outputs = 6 * (LENGTH * 2 * (SIZE + 1) * 4)  # what the backward pass needs: out and lse
        assert many - few - outputs < 0.5 * self.ONE


@pytest.mark.slow
def test_widening_the_sources_costs_no_memory_in_the_forward_pass_on_a_tpu():
    try:
        topology.devices("v5e")
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    compiled = {
        wide: topology.compile_for(
            "v5e", lambda *x, wide=wide: loss(wide, *x), *specs(jnp.bfloat16, 8)
        )
        for wide in (False, True)
    }
    one = LENGTH * KV_HEADS * SIZE * 2
    assert temporaries(compiled[True]) <= temporaries(compiled[False]) + 0.5 * one
