"""Gradients: under every remat policy and under scanning they are those of the plain program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.model import small

HYBRID = "window_hybrid:window=5,full_every=2"
SPECS = {"fusedkv": 4, "cla:k=2": 4, "yoco_pp": 6, HYBRID: 8}  # number of layers: two repeats each
T = 10


def gradients(config):
    """Gradients of every parameter, those of a layer under its own number."""
    graph, params = nnx.split(small.decoder(config))
    tokens = small.tokens(2, T)

    @jax.jit
    @jax.grad
    def loss(params):
        logits = nnx.merge(graph, params)(tokens)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
        return -jnp.mean(chosen)

    flat, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(loss(params)))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 0, f"{name} gets no gradient: the comparison says nothing"
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found[name] / scale, gradient / scale, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "spec",
    ["fusedkv", "cla:k=2", *(pytest.param(s, marks=pytest.mark.slow) for s in ("yoco_pp", HYBRID))],
)
def test_scanned_and_rematerialized_gradients_equal_the_plain_program(spec):
    layers = dict(num_layers=SPECS[spec])
    plain = gradients(small.config(spec, scan_layers=False, **layers))
    # All policies once; elsewhere scanning together with the policy that recomputes the most.
    policies = ("none", "full", "dots", "qkv") if spec == "fusedkv" else ("full",)
    for remat in policies:
        assert_close(gradients(small.config(spec, remat=remat, **layers)), plain)


def test_latent_attention():
    plain = gradients(small.config("fusedkv", "mla", scan_layers=False, num_layers=4))
    assert_close(gradients(small.config("fusedkv", "mla", remat="qkv", num_layers=4)), plain)


def test_gradient_equals_a_finite_difference():
    """The plain program itself: a directional derivative through a fused layer's source."""
    config = small.config("fusedkv", init_std=0.1, num_layers=4)
    graph, params = nnx.split(small.decoder(config))
    tokens = small.tokens(2, T)

    @jax.jit
    def loss(params):
        return jnp.mean(jnp.square(nnx.merge(graph, params)(tokens)))

    def signs(leaf):
        return jnp.sign(jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype))).reshape(leaf.shape)

    direction = jax.tree.map(signs, params)
    products = jax.tree.map(jnp.vdot, jax.grad(loss)(params), direction)
    slope = float(sum(jax.tree.leaves(products)))
    step = 1e-3
    moved = [
        loss(jax.tree.map(lambda p, d, s=sign: p + s * step * d, params, direction))
        for sign in (1, -1)
    ]
    assert float(moved[0] - moved[1]) / (2 * step) == pytest.approx(slope, rel=2e-2)
