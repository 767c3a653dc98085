"""Layouts that must agree with each other, properties of fusion weights, and where they start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusedkv_jax as fkv
from fusedkv_jax import layouts
from fusedkv_jax.model import fold_fusion, mixing
from tests.oracles.decoder import Row, build, draw, logits, small_config

TOKENS = np.random.default_rng(1).integers(0, 37, (2, 10))
TOLERANCE = 1e-4
DRAWN = draw(small_config("mha"))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(layout, fusion=()):
    return np.asarray(build(small_config(layout), DRAWN, fusion)(jnp.asarray(TOKENS, jnp.int32)))


@functools.cache
def outputs(layout):
    """Logits of a layout without stream weights."""
    return run(layout)


def assert_equal(one, other):
    assert np.std(one) > 0.5
    np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)


def selecting(source, *size):
    """Weights [3 upper layers, 2 sources, ...]: one for one source, zero for the other."""
    weights = np.zeros((3, 2, *size), np.float32)
    weights[:, source] = 1
    return weights


@pytest.mark.parametrize(
    ("key_source", "value_source", "layout"),
    [(1, 0, "fusedkv_lite"), (1, 1, "yoco"), (0, 1, "lite_reversed")],
)
def test_weights_of_zero_and_one_are_reuse(key_source, value_source, layout):
    fusion = [selecting(key_source, 2, 4), selecting(value_source, 2, 8)]
    assert_equal(run("fusedkv", fusion), outputs(layout))


def test_lite_learnable_starts_as_lite():
    start = initial_parameters("lite_learnable")
    assert_equal(run("lite_learnable", start), outputs("fusedkv_lite"))
    for parameter in start:
        np.testing.assert_array_equal(parameter, 1)


def test_yoco_pp_starts_as_yoco():
    start = initial_parameters("yoco_pp")
    for parameter in start:
        np.testing.assert_allclose(parameter, [[0, 1 / 35]] * 2)
    assert_equal(run("yoco_pp", start), outputs("yoco"))


def test_resformer_with_all_weight_on_its_own_values_is_plain():
    assert_equal(run("resformer", [np.ones((5, 1))]), outputs("mha"))
    np.testing.assert_allclose(initial_parameters("resformer")[0], 0.5)


def test_dense_fusion_of_one_source_is_reuse():
    keys, values = np.zeros((3, 3)), np.zeros((3, 3))
    keys[:, 1] = values[:, 2] = 1
    reused = outputs("fusedkv_lite:key_source=1,value_source=2")
    assert_equal(run("dense_fusion", [keys, values]), reused)


def test_dense_fusion_of_two_sources_is_scalar_fusedkv():
    keys, values = normal(2, 3, 3), normal(3, 3, 3)
    keys[:, 1] = values[:, 1] = 0
    scalar = run("fusedkv:granularity=scalar", [keys[:, [0, 2]], values[:, [0, 2]]])
    assert_equal(run("dense_fusion", [keys, values]), scalar)


def test_shared_heads_are_tiled_weights():
    keys, values = normal(4, 3, 2, 4), normal(5, 3, 2, 8)
    tiled = [np.stack([w, w], axis=2) for w in (keys, values)]
    shared = run("fusedkv:granularity=shared_channel", [keys, values])
    assert_equal(run("fusedkv", tiled), shared)


def test_iterative_is_its_collapsed_form():
    # (p, r) for keys and (t, s) for values; see METHODS of FusedKV's recursion.
    keys, values = normal(6, 3, 2, 2, 4), normal(7, 3, 2, 2, 8)
    direct_keys, direct_values = keys.copy(), values.copy()
    for i in (1, 2):
        direct_keys[i, 0] = keys[i, 0] * direct_keys[i - 1, 0]
        direct_keys[i, 1] = keys[i, 0] * direct_keys[i - 1, 1] + keys[i, 1]
        direct_values[i, 0] = values[i, 1] * direct_values[i - 1, 0] + values[i, 0]
        direct_values[i, 1] = values[i, 1] * direct_values[i - 1, 1]
    iterative = run("fusedkv:parameterization=iterative", [keys, values])
    assert_equal(iterative, run("fusedkv", [direct_keys, direct_values]))


def test_folding_regroups_layers_that_become_equal():
    """Two scales are two runs of layers; folded they are one. A split of the layout stays."""
    own = layouts.Stream(own=True)

    def residual(scale):
        how = layouts.Mixing(init="own", scale=scale)
        return layouts.Stream(own=True, sources=(0,), weights="scalar", mixing=how)

    layers = [layouts.LayerKV(key, own) for key in (own, residual(2.0), residual(3.0))]
    layout = layouts.KVLayout(tuple(layers), splits=(1,))
    model = fkv.Decoder(small_config(layout, num_layers=3), rngs=nnx.Rngs(0))
    folded = fold_fusion(model)
    assert folded.config.kv_layout.splits == (1,)
    assert [run.repeats for run in layouts.runs(layout)] == [1, 1, 1]
    assert [run.repeats for run in layouts.runs(folded.config.kv_layout)] == [1, 2]
    tokens = jnp.asarray(TOKENS, jnp.int32)
    np.testing.assert_allclose(folded(tokens), model(tokens), rtol=0, atol=1e-6)


def test_folding_is_done_once_for_each_set_of_parameters():
    spec = "fusedkv:parameterization=iterative"
    model = fkv.Decoder(small_config(spec, num_layers=4), rngs=nnx.Rngs(0))
    folded = fold_fusion(model)
    assert fold_fusion(model) is folded
    (weights, *_) = model.mixing.weights
    weights[...] = 2 * weights[...]
    again = fold_fusion(model)
    assert again is not folded
    tokens = jnp.asarray(TOKENS, jnp.int32)
    np.testing.assert_allclose(again(tokens), model(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cla:k=1", "mha"),
        ("mlkv:m=6", "mha"),
        ("fusedkv:split=6", "mha"),
        ("yoco:split=6", "mha"),
        ("cla:k=6", "mlkv:m=1"),
        ("0_1_2_k2v0x3", "fusedkv_lite"),
        ("0_1_2_f0+2x3", "fusedkv"),
        ("0_k1v0_k2v0_k3v0_k4v0_k5v0", "svformer"),
        ("0_0_k2v0_k3v0_k4v0_k5v0", "svformer_half"),
    ],
)
def test_layouts_that_are_the_same(one, other):
    """The very same layout, so the very same program."""
    assert layouts.resolve(one, 6) == layouts.resolve(other, 6)


# Fusion weights on rotated keys.


def test_logits_depend_on_relative_positions_only(monkeypatch):
    fusion = [normal(8, 3, 2, 2, 4), normal(9, 3, 2, 2, 8)]
    graph, state = nnx.split(build(small_config("fusedkv"), DRAWN, fusion))
    positions = jnp.arange(10)[None]
    tokens = jnp.asarray(TOKENS[:1], jnp.int32)

    def logits_at(shift):
        @jax.jit
        def forward(state, positions):
            model = nnx.merge(graph, state)
            return model.logits(model.hidden(tokens, None, positions))

        return [np.asarray(forward(state, positions + by)) for by in (0, shift)]

    here, there = logits_at(shift=37)
    assert_equal(here, there)

    tied = mixing._expand

    def untied(config, kind, stream, weights):
        wide = tied(config, kind, stream, weights)
        # Keys: channel c and its partner c + 4 no longer share a weight.
        return jnp.concatenate([wide[..., :4], wide[..., 3::-1]], -1) if kind == "key" else wide

    monkeypatch.setattr(mixing, "_expand", untied)
    here, there = logits_at(shift=37)
    assert np.abs(here - there).max() > 0.1


# Where stream weights start.


def initial(layout, read, **changes):
    """What `read` takes from the stream weights of a new model.

    Compiled, so that the other parameters, which may be huge, are never made.
    """
    config = small_config(layout, **changes)
    found = jax.jit(lambda: read(fkv.Decoder(config, rngs=nnx.Rngs(0)).mixing))()
    return jax.tree.map(np.asarray, found)


def initial_parameters(layout, **changes):
    """Stream weights as they are stored."""
    return initial(layout, lambda module: [p[...] for p in module.weights], **changes)


def initial_weights(layout, num_layers, **changes):
    """Effective weights [upper layers, sources, K, H] of keys and values."""
    found = initial(layout, lambda module: module(), num_layers=num_layers, **changes)
    upper = range(num_layers // 2, num_layers)
    return [np.stack([found[kind, i] for i in upper]) for kind in layouts.KINDS]


# Medians of the absolute product of 1, 2, .. 8 standard normal numbers.
MEDIANS = (0.67, 0.36, 0.19, 0.10, 0.055, 0.03, 0.016, 0.008)
MANY = dict(num_layers=16, num_heads=1024, num_kv_heads=1024, head_dim=128)


@pytest.mark.parametrize("parameterization", ["equivalent", "iterative"])
def test_initial_fusion_leans_on_middle_keys_and_lowest_values(parameterization):
    keys, values = initial_weights(f"fusedkv:parameterization={parameterization}", **MANY)
    a0, am, b0, bm = keys[:, 0], keys[:, 1], values[:, 0], values[:, 1]
    for vanishing in (a0, bm):
        medians = np.median(np.abs(vanishing), axis=(1, 2))
        np.testing.assert_allclose(medians, MEDIANS, rtol=0.08)
    for growing in (am, b0):
        rms = np.sqrt(np.mean(np.square(growing, dtype=np.float64), axis=(1, 2)))
        np.testing.assert_allclose(rms, np.sqrt(np.arange(1, 9)), rtol=0.1)


def test_initial_normal_weights_are_independent():
    for weights in initial_weights("fusedkv:parameterization=normal", **MANY):
        flat = weights.reshape(16, -1)
        half = flat[:, : flat.shape[1]]
        np.testing.assert_allclose(half.std(axis=1), 1, rtol=0.02)
        correlation = np.corrcoef(half) - np.eye(16)
        assert np.abs(correlation).max() < 0.02


def test_dense_fusion_starts_with_fan_in():
    many = dict(num_layers=200, num_heads=2)
    for parameter in initial_parameters("dense_fusion", **many):
        assert parameter.shape == (100, 100)
        np.testing.assert_allclose(parameter.std(), 0.1, rtol=0.05)


def test_equivalent_is_iterative_at_the_start_but_stores_direct_weights():
    same = dict(num_layers=12)
    for one, other in zip(
        initial_weights("fusedkv", **same),
        initial_weights("fusedkv:parameterization=iterative", **same),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    stored, factors = (
        initial_parameters(name, **same)[1]
        for name in ("fusedkv", "fusedkv:parameterization=iterative")
    )
    np.testing.assert_allclose(stored, initial_weights("fusedkv", **same)[1], rtol=1e-6)
    assert np.abs(stored[1:] - factors[1:]).max() > 0.5


# Gradients through the sources.


def fused_rows(b0):
    """FusedKV's table with key weights of one half and no middle values."""
    upper = [Row([(0, 0.5), (2, 0.5)], [(0, b0[c]), (2, 1.0)]) for c in range(3)]
    return [Row([(i, 1.0)], [(i, 1.0)]) for i in range(3)] + upper


def test_each_upper_layer_gives_gradient_to_the_lowest_values():
    """Layer 0's own output is cut off, and all but one upper layer's weight on its values is 0."""
    cut = draw(small_config("mha"))
    cut.layers[0]["o_proj"] = np.zeros_like(cut.layers[0]["o_proj"])
    config = small_config("fusedkv")
    cotangent = normal(10, 2, 10, 37)
    fusion = [np.full((3, 2, 2, 4), 0.5), np.ones((3, 2, 2, 8))]
    graph, state = nnx.split(build(config, cut, fusion))
    flat = dict(nnx.to_flat_state(state))
    v_proj, b_path = ("runs", 0, 0, "attention", "v_proj"), ("mixing", "weights", 1)

    @jax.jit
    @jax.grad
    def gradient(weight, b0):
        values = jnp.broadcast_to(jnp.stack([b0, jnp.ones(3)], 1)[..., None, None], (3, 2, 2, 8))
        changed = {v_proj: flat[v_proj].replace(weight), b_path: flat[b_path].replace(values)}
        model = nnx.merge(graph, nnx.from_flat_state(list((flat | changed).items())))
        return jnp.sum(model(jnp.asarray(TOKENS, jnp.int32)) * cotangent)

    weight = jnp.asarray(np.stack([cut.layers[i]["v_proj"] for i in range(3)]))
    np.testing.assert_array_equal(gradient(weight, jnp.zeros(3))[0], 0)
    direction = np.random.default_rng(11).normal(size=weight.shape[1:])
    original = cut.layers[0]["v_proj"].astype(np.float64)
    for upper in range(3):
        b0 = np.eye(3, dtype=np.float32)[upper]
        ours = np.sum(np.asarray(gradient(weight, jnp.asarray(b0))[0]) * direction)
        sides = []
        for step in (1e-5, -1e-5):
            cut.layers[0]["v_proj"] = original + step * direction
            outs = np.stack([logits(cut, fused_rows(b0), row) for row in TOKENS])
            sides.append(np.sum(outs * cotangent))
        expected = (sides[0] - sides[1]) / 2e-5
        assert abs(expected) > 1
        np.testing.assert_allclose(ours, expected, rtol=1e-3)
