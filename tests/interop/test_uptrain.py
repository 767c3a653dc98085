"""Conversion by least squares: exact where a layout can say what the model did, near elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusedkv_jax.interop import uptrain
from tests.oracles.decoder import random_decoder, small_config

TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 37, (16, 24)), jnp.int32)


def gap(model, other, tokens):
    """Mean divergence in nats of what one predicts from what the other does."""
    p, q = (jax.nn.log_softmax(m(tokens)) for m in (model, other))
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1)))


def test_keys_that_another_layer_has_but_for_weights_and_phases_are_explained():
    rng = np.random.default_rng(0)
    sources = [rng.normal(size=(200, 8)) for _ in range(2)]
    weights, phases = rng.normal(size=(2, 4)), np.exp(1j * rng.uniform(0, np.pi, 4))
    mixed = sum(w * (s[:, :4] + 1j * s[:, 4:]) for w, s in zip(weights, sources, strict=True))
    turned = phases * mixed
    target = np.concatenate([turned.real, turned.imag], -1)
    found, factors, share = uptrain._fit_keys(target, sources, "channel", True)
    assert share > 0.998  # phases are sought on a grid
    np.testing.assert_allclose(factors, phases, atol=0.06)
    np.testing.assert_allclose(found, weights, atol=0.1)
    assert uptrain._fit_keys(target, sources, "channel", False)[-1] < 0.9


def test_values_that_another_layer_has_but_for_weights_and_a_map_are_explained():
    rng = np.random.default_rng(0)
    sources = [rng.normal(size=(300, 6)) for _ in range(2)]
    weights, matrix = rng.uniform(0.2, 1, size=(2, 6)), rng.normal(size=(6, 6))
    target = sum(w * s for w, s in zip(weights, sources, strict=True)) @ matrix
    _, one = uptrain._fit_values(target, sources[:1], None)
    found, share = uptrain._fit_values(target, sources, "channel")
    assert share > 0.97 > one + 0.2
    assert found.shape == (2, 6)


@pytest.mark.parametrize("layout", ["fusedkv", "cla"])
def test_a_fit_is_nearer_than_dropping_projections(layout):
    model = random_decoder(small_config("mha", num_layers=4, qk_norm=False))
    fitted = uptrain.fit(model, layout, TOKENS)
    assert fitted.config.kv_layout.spec == layout
    dropped = uptrain._start(model, fitted.config)
    before, after = (gap(model, other, TOKENS) for other in (dropped, fitted))
    assert after < 0.5 * before


def test_nothing_is_lost_where_nothing_is_dropped():
    model = random_decoder(small_config("mha", num_layers=2))
    again = uptrain.fit(model, "mha", TOKENS)
    np.testing.assert_allclose(again(TOKENS), model(TOKENS), atol=1e-5)


def test_what_cannot_be_fitted_is_refused():
    model = random_decoder(small_config("mha", num_layers=4))
    for layout, message in (
        ("lckv", "cyclic"),
        ("svformer", "layer 1: only layers that cache both"),
        ("dense_fusion", "layer 2: weights are fitted per channel"),
    ):
        with pytest.raises(ValueError, match=message):
            uptrain.fit(model, layout, TOKENS)
    with pytest.raises(ValueError, match="share keys or values already"):
        uptrain.fit(random_decoder(small_config("cla", num_layers=4)), "fusedkv", TOKENS)
