"""Conversion by least squares: exact where a layout can say what the model did, near elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusedkv_jax as fkv
from fusedkv_jax.interop import uptrain
from fusedkv_jax.interop.uptrain.layers import Heads
from fusedkv_jax.interop.uptrain.least_squares import Moments, moments, nearest
from fusedkv_jax.interop.uptrain.reading import fit_keys, fit_values, stream_sums
from fusedkv_jax.model.transform import layers_of, rebuild
from tests.oracles.decoder import random_decoder, small_config

TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 37, (16, 24)), jnp.int32)


def gap(model, other, tokens):
    """Mean divergence in nats of what one predicts from what the other does."""
    p, q = (jax.nn.log_softmax(m(tokens)) for m in (model, other))
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1)))


def sums(target, sources):
    """Sums of one head [T, H], of keys and of values, from those of one head each."""
    one = lambda array: jnp.asarray(array[None, :, None], jnp.float32)  # noqa: E731
    read = tuple(one(source) for source in sources)
    found = stream_sums(Heads(one(np.ones_like(target)), one(target), one(target)), read, read)
    keys, values = ([np.asarray(array) for array in kind] for kind in found)
    return [keys[0][..., 0, :], keys[1][:, 0, 0], keys[2][0], keys[3][0]], [
        values[0][:, :, 0].astype(float),
        values[1][:, 0, 0].astype(float),
        values[2][0].astype(float),
    ]


def test_keys_that_another_layer_has_but_for_weights_and_phases_are_explained():
    rng = np.random.default_rng(0)
    sources = [rng.normal(size=(200, 8)) for _ in range(2)]
    weights, phases = rng.normal(size=(2, 4)), np.exp(1j * rng.uniform(0, np.pi, 4))
    mixed = sum(w * (s[:, :4] + 1j * s[:, 4:]) for w, s in zip(weights, sources, strict=True))
    turned = phases * mixed
    target = np.concatenate([turned.real, turned.imag], -1)
    found = fit_keys(*sums(target, sources)[0], weighted=True, rotated=True)
    assert found.share > 0.998  # phases are sought on a grid
    np.testing.assert_allclose(found.factors, phases, atol=0.06)
    np.testing.assert_allclose(found.weights, weights, atol=0.1)
    assert fit_keys(*sums(target, sources)[0], weighted=True, rotated=False).share < 0.9
    scaled = np.concatenate([(turned * 2).real, (turned * 2).imag], -1)
    single = fit_keys(*sums(scaled, [target])[0], weighted=False, rotated=True)
    np.testing.assert_allclose(single.factors, 2, rtol=1e-4)
    assert single.share > 0.9999


def test_values_that_another_layer_has_but_for_weights_and_a_map_are_explained():
    rng = np.random.default_rng(0)
    sources = [rng.normal(size=(300, 6)) for _ in range(2)]
    weights, matrix = rng.uniform(0.2, 1, size=(2, 6)), rng.normal(size=(6, 6))
    target = sum(w * s for w, s in zip(weights, sources, strict=True)) @ matrix
    metric = np.diag(rng.uniform(0.5, 2, 6))
    one = fit_values(*sums(target, sources[:1])[1], metric, weighted=False)
    both = fit_values(*sums(target, sources)[1], metric, weighted=True)
    assert both.share > 0.97 > one.share + 0.2
    assert both.weights.shape == (2, 6)
    mixed = sum(w * s for w, s in zip(both.weights, sources, strict=True))
    assert ((mixed @ both.matrix - target) ** 2).sum() < 0.05 * (target**2).sum()


def test_the_ridge_is_chosen_on_what_is_held_out():
    rng = np.random.default_rng(0)
    true, start = rng.normal(size=(2, 8, 3))
    x = rng.normal(size=(10, 12, 8))

    def error(noise, **options):
        y = x @ true + noise * rng.normal(size=(10, 12, 3))
        parts = [moments(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(x, y, strict=True)]
        fitted = nearest(parts, 2, start if noise else true, **options)
        return ((fitted - true) ** 2).sum()

    assert error(0.0) < 1e-6
    # Few tokens and much noise: the start, which is near, is better than what they say.
    start = true + 0.01
    assert error(20.0) < 0.6 * error(20.0, ridge=1e-4)


def test_sums_tell_the_error():
    rng = np.random.default_rng(0)
    x, y, matrix = rng.normal(size=(9, 4)), rng.normal(size=(9, 2)), rng.normal(size=(4, 2))
    found = Moments(x.T @ x, x.T @ y, float((y * y).sum())).error(matrix)
    np.testing.assert_allclose(found, ((x @ matrix - y) ** 2).sum())


@pytest.mark.parametrize(
    "layout, layers", [("fusedkv", 4), ("cla", 4), ("fusedkv_lite", 4), ("lckv:w=1", 3)]
)
def test_a_fit_is_nearer_than_dropping_projections(layout, layers):
    model = random_decoder(small_config("mha", num_layers=layers, qk_norm=layout == "cla"))
    fitted = uptrain.fit(model, layout, TOKENS)
    assert fitted.config.kv_layout.spec == layout
    before, after = (gap(model, one, TOKENS) for one in (uptrain.drop(model, layout), fitted))
    assert after < 0.4 * before


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_streams_that_are_another_layers_in_disguise_are_found(fraction):
    """Upper layers whose keys and values are maps of layer 1's: yoco says what the model did."""
    rope = fkv.RopeConfig(fraction=fraction)
    config = small_config("mha", num_layers=4, qk_norm=False, num_kv_heads=4, rope=rope)
    # Channels that rotate together, half and half; and after them those that do not rotate.
    first_half, second_half = (
        ([0, 1, 2, 3], [4, 5, 6, 7])
        if fraction == 1
        else (
            [0, 1, 4, 5],
            [2, 3, 6, 7],
        )
    )
    model, rng = random_decoder(config), np.random.default_rng(3)
    layers = layers_of(model)
    first = nnx.merge(*layers[1])
    for i in (1, 2, 3):
        block = nnx.merge(*layers[i])
        # Layers that change nothing, so that all read the same hidden states.
        block.attention.o_proj.set_value(block.attention.o_proj[...] * (i == 3))
        block.mlp.down.set_value(block.mlp.down[...] * (i == 3))
        block.attention.q_proj.set_value(block.attention.q_proj[...] * (i != 2))
        block.attention_norm.scale.set_value(first.attention_norm.scale[...])
        if i == 3:
            order = [2, 0, 3, 1]
            maps = rng.normal(size=(4, 8, 8)) / 8**0.5
            turn = np.exp(1j * rng.uniform(0, 2 * np.pi, (4, 4)))
            keys = np.asarray(first.attention.k_proj[...])[:, order]
            z = (keys[..., first_half] + 1j * keys[..., second_half]) * turn
            turned = np.empty_like(keys)
            turned[..., first_half], turned[..., second_half] = z.real, z.imag
            block.attention.k_proj.set_value(jnp.asarray(turned, jnp.float32))
            values = np.asarray(first.attention.v_proj[...])[:, order]
            block.attention.v_proj.set_value(
                jnp.asarray(np.einsum("dkh,khi->dki", values, maps), jnp.float32)
            )
        layers[i] = nnx.split(block)
    model = rebuild(model, layers=layers)
    fitted = uptrain.fit(model, "yoco", TOKENS, ridge=1e-6)
    assert (
        gap(model, fitted, TOKENS) < 1e-3 < 0.05 < gap(model, uptrain.drop(model, "yoco"), TOKENS)
    )


def test_nothing_is_lost_where_nothing_is_dropped():
    model = random_decoder(small_config("mha", num_layers=2))
    again = uptrain.fit(model, "mha", TOKENS)
    np.testing.assert_allclose(again(TOKENS), model(TOKENS), atol=1e-5)


def test_windows_that_a_layout_brings_are_fitted_to_the_original_without_them():
    model = random_decoder(small_config("mha", num_layers=4))
    for layout in ("0s4_1s4_2_3", "0s4_1_2_3s4"):
        fitted = uptrain.fit(model, layout, TOKENS)
        before, after = (gap(model, one, TOKENS) for one in (uptrain.drop(model, layout), fitted))
        assert after < 0.6 * before


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[0], r"tokens has shape \(24,\); use \[B, T\]"),
        (TOKENS.tolist(), "tokens is list; use an array of int32"),
        (TOKENS.at[0, 0].set(37), "tokens holds id 37; use ids from 0 to vocab_size - 1 = 36"),
        (TOKENS[:0], r"tokens has shape \(0, 24\); give text to fit on"),
    ],
)
def test_tokens_that_are_none_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        uptrain.fit(random_decoder(small_config("mha", num_layers=2)), "cla", tokens)


def test_what_cannot_be_fitted_is_refused():
    model = random_decoder(small_config("mha", num_layers=4))
    for layout, message in (
        ("svformer", "layer 1: only layers that cache both"),
        ("dense_fusion", "layer 2: weights are fitted per channel"),
    ):
        with pytest.raises(ValueError, match=message):
            uptrain.fit(model, layout, TOKENS)
    with pytest.raises(ValueError, match="share keys or values already"):
        uptrain.fit(random_decoder(small_config("cla", num_layers=4)), "fusedkv", TOKENS)
