"""A model on quantized caches: chunks do not matter, and the result is near the exact one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusedkv_jax as fkv
from fusedkv_jax.cache.kivi import KiviStore
from fusedkv_jax.cache.plan import split_plan
from fusedkv_jax.model.transform import unroll_layers
from tests.model import small
from tests.model.test_equality import extend

B, T, CHUNK = 2, 192, 64
LENGTHS = np.array([192, 150], np.int32)


def filled(model, tokens, size, dtype=None, plan=None):
    """Logits of each row's last token, and the cache, of a prompt in chunks."""
    graph, params = nnx.split(model)
    cache = fkv.KVCache.create(model.config, batch_size=B, max_length=T + 2, dtype=dtype)
    if plan is not None:
        cache = regrouped(cache, plan)
    ends = np.zeros((B, small.VOCAB), np.float32)
    for first in range(0, T, size):
        count = np.clip(LENGTHS - first, 0, size).astype(np.int32)
        logits, cache = extend(graph, params, tokens[:, first : first + size], count, cache, "last")
        ends = np.where((count > 0)[:, None], logits, ends)
    return ends, cache


def regrouped(cache, plan):
    """An empty cache with the same streams in other groups."""
    (store,) = cache.stores
    stores = tuple(
        type(store)(store.keys[: len(group.keys)], store.values[: len(group.values)])
        for group in plan.groups
    )
    return fkv.KVCache(stores, cache.lengths, plan)


@pytest.mark.parametrize(
    "spec, geometry, dtype",
    [
        ("fusedkv", "gqa", "int8"),
        ("fusedkv", "gqa", "int4"),
        pytest.param("fusedkv", "mla", "int4", marks=pytest.mark.slow),
        pytest.param("fusedkv", "mla", "float8_e4m3fn", marks=pytest.mark.slow),
        pytest.param("window_hybrid:window=5,full_every=2", "gqa", "int8", marks=pytest.mark.slow),
        pytest.param("window_hybrid:window=5,full_every=2", "gqa", "int4", marks=pytest.mark.slow),
        pytest.param("yoco_pp", "gqa", "float8_e5m2", marks=pytest.mark.slow),
    ],
)
def test_quantized_caches(spec, geometry, dtype):
    mla = fkv.MLAConfig(kv_lora_rank=16, nope_dim=8, rope_dim=4, v_dim=6)
    changes = {"mla": mla} if geometry == "mla" else {}
    depth = 8 if spec.startswith("window_hybrid") else 4  # two layers of a kind in each half
    config = small.config(spec, "gqa", num_layers=depth, max_length=256, init_std=0.1, **changes)
    model = small.decoder(config)
    tokens = small.tokens(B, T)
    exact = np.asarray(model(tokens))[np.arange(B), LENGTHS - 1]
    whole, cache = filled(model, tokens, T, dtype)
    assert any(isinstance(s, KiviStore) for s in cache.stores) == (dtype == "int4")
    chunked, other = filled(model, tokens, CHUNK, dtype)
    # Rounding noise may move a code by one, which is far less than quantization does.
    off, spread = np.std(whole - exact), exact.std()
    assert 1e-5 < off < 0.25 * spread, (off, spread)
    np.testing.assert_allclose(chunked, whole, atol=max(0.1 * off, 1e-4), rtol=0)
    for a, b in zip(jax.tree.leaves(cache.stores), jax.tree.leaves(other.stores), strict=True):
        if a.dtype == jnp.int8:
            difference = np.abs(np.asarray(a, int) - np.asarray(b, int))
            # Noise of 1e-5 moves the codes that lie so near to the border between two of 255.
            assert difference.max() <= 1 and difference.mean() < 3e-3


@pytest.mark.parametrize("spec", ["fusedkv", "mha"])
def test_groups_and_unrolled_layers_change_nothing(spec):
    config = small.config(spec, num_layers=4 if spec == "mha" else 6, max_length=256)
    model = small.decoder(config)
    tokens = small.tokens(B, T)
    expected, _ = filled(model, tokens, T)
    found, cache = filled(model, tokens, T, plan=split_plan(config.kv_layout))
    assert len(cache.stores) == (2 if spec == "fusedkv" else 4)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    found, _ = filled(unroll_layers(model), tokens, T)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if spec == "mha":
        np.testing.assert_allclose(unroll_layers(model)(tokens), model(tokens), atol=1e-5)


def test_observed_layers_show_what_they_read():
    """Softmax weights rebuilt from what `watch` sees sum to one, over the visible keys only."""
    config = small.config("fusedkv", num_layers=4)
    model = small.decoder(config)
    tokens, count = small.tokens(B, 9), jnp.asarray([9, 6])

    def watch(reading):
        (piece,) = reading.pieces
        keys = piece.keys
        weights = reading.weights["key"]
        if weights is not None:
            keys = [sum(w * x for w, x in zip(weights, keys, strict=True))]
        scores = jnp.einsum("btkgh,bskh->btkgs", reading.q.reshape(B, -1, 2, 2, 8), keys[0])
        lse = reading.lse.reshape(*scores.shape[:-1])
        powers = jnp.exp(scores * 8**-0.5 - lse[..., None])
        seen = jnp.arange(12) <= reading.rows.positions[..., None]
        seen &= jnp.arange(12) < count[:, None, None]
        return (powers * seen[:, :, None, None]).sum(-1), reading.rows.positions

    cache = fkv.KVCache.create(config, batch_size=B, max_length=12)
    graph, params = nnx.split(model)
    run = jax.jit(lambda params: nnx.merge(graph, params).observe(tokens, count, cache, watch, 3))
    logits, _, found = run(params)
    expected = model(tokens)[jnp.arange(B), count - 1]
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    for layer, (total, _) in enumerate(found):
        assert total.shape[1] == (9 if layer < 2 else 3)
        np.testing.assert_allclose(total, 1, atol=1e-4)
    np.testing.assert_array_equal(found[3][1], [[6, 7, 8], [3, 4, 5]])
