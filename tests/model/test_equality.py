"""One model, many ways to run it: whole, in chunks, token by token, ragged, packed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusedkv_jax as fkv
from tests.model import small

B, T, CHUNK = 3, 12, 4
LENGTHS = np.array([12, 7, 1], np.int32)
TOLERANCE = dict(atol=1e-4, rtol=0)


def test_every_registered_layout_is_tested():
    assert set(small.SPECS) == set(fkv.layouts.names())


@functools.partial(jax.jit, static_argnums=(0, 5))
def extend(graph, params, tokens, count, cache, rows):
    return nnx.merge(graph, params).extend(tokens, count, cache, rows)


@functools.partial(jax.jit, static_argnums=0)
def one_by_one(graph, params, tokens, cache):
    def step(cache, token):
        logits, cache = nnx.merge(graph, params).extend(
            token[:, None], jnp.ones(token.shape[0], jnp.int32), cache
        )
        return cache, logits

    cache, logits = jax.lax.scan(step, cache, tokens.T)
    return logits.swapaxes(0, 1), cache


def stored(cache, lengths):
    """What a cache holds for the tokens seen, everything else zero."""
    arrays = []
    for array in (*cache.keys, *cache.values):
        if array is not None:
            filled = np.arange(array.shape[2]) < np.asarray(lengths)[:, None]
            arrays.append(np.where(filled[None, :, :, None, None], array, 0))
    return arrays


@pytest.mark.parametrize("spec, geometry", small.cases())
def test_ways_to_run_a_model_agree(spec, geometry):
    config = small.config(spec, geometry)
    model = small.decoder(config)
    graph, params = nnx.split(model)
    tokens = small.tokens(B, T)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    whole = model(tokens, jnp.zeros((B, T), jnp.int32), positions)
    assert float(jnp.std(whole)) > 0.1  # else the comparisons below would say little
    ends = whole[jnp.arange(B), LENGTHS - 1]

    def empty():
        return fkv.KVCache.create(config, batch_size=B, max_length=T + 3)

    # One-shot prefill of a ragged batch.
    last, one_shot = extend(graph, params, tokens, LENGTHS, empty(), "last")
    np.testing.assert_allclose(last, ends, **TOLERANCE)
    np.testing.assert_array_equal(one_shot.lengths, LENGTHS)

    # The same in chunks, the last of them ragged or empty.
    cache, collected = empty(), np.zeros_like(last)
    for first in range(0, T, CHUNK):
        count = np.clip(LENGTHS - first, 0, CHUNK).astype(np.int32)
        chunk = tokens[:, first : first + CHUNK]
        logits, cache = extend(graph, params, chunk, count, cache, "last")
        collected = np.where((count > 0)[:, None], logits, collected)
    np.testing.assert_allclose(collected, ends, **TOLERANCE)
    for chunked, expected in zip(stored(cache, LENGTHS), stored(one_shot, LENGTHS), strict=True):
        np.testing.assert_allclose(chunked, expected, **TOLERANCE)

    # Token by token, from nothing.
    stepped, _ = one_by_one(graph, params, tokens, empty())
    np.testing.assert_allclose(stepped, whole, **TOLERANCE)

    # Two documents packed into one row see nothing of each other.
    split = 5
    first = jnp.arange(T) < split
    segments = jnp.broadcast_to(jnp.where(first, 3, 8), (B, T))
    places = jnp.broadcast_to(jnp.where(first, jnp.arange(T), jnp.arange(T) - split), (B, T))
    packed = model(tokens, segments, places)
    second = jnp.roll(tokens, -split, axis=1)
    alone = model(second, jnp.zeros((B, T), jnp.int32), positions)
    np.testing.assert_allclose(packed[:, :split], whole[:, :split], **TOLERANCE)
    np.testing.assert_allclose(packed[:, split:], alone[:, : T - split], **TOLERANCE)


@pytest.mark.parametrize("spec", ["fusedkv", "window_hybrid:window=5,full_every=2", "yoco_pp"])
def test_all_rows_of_a_chunk_equal_the_full_forward(spec):
    """Prompt log-probabilities need every row of the upper layers, on a cache with a past."""
    config = small.config(spec)
    graph, params = nnx.split(model := small.decoder(config))
    tokens = small.tokens(B, T)
    cache = fkv.KVCache.create(config, batch_size=B, max_length=T)
    half = np.full(B, T // 2, np.int32)
    first, cache = extend(graph, params, tokens[:, : T // 2], half, cache, "all")
    second, cache = extend(graph, params, tokens[:, T // 2 :], half, cache, "all")
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), model(tokens), **TOLERANCE)


@pytest.mark.parametrize("spec", ["fusedkv", "yoco:window=4"])
def test_upper_layers_do_not_touch_the_cache(spec):
    """A chunk without wanted logits leaves the same cache as one with all of them."""
    config = small.config(spec)
    graph, params = nnx.split(small.decoder(config))
    tokens = small.tokens(B, T)
    caches = []
    for rows in ("none", "all"):
        cache = fkv.KVCache.create(config, batch_size=B, max_length=T)
        logits, cache = extend(graph, params, tokens, LENGTHS, cache, rows)
        assert (logits is None) == (rows == "none")
        caches.append(cache)
    for a, b in zip(jax.tree.leaves(caches[0]), jax.tree.leaves(caches[1]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "spec", ["mha", "fusedkv", "cla:k=2", "window_hybrid:window=5,full_every=2"]
)
def test_scanned_layers_equal_unrolled_ones(spec):
    config = small.config(spec)
    scanned = small.decoder(config)
    unrolled = small.decoder(config.replace(scan_layers=False))
    tokens = small.tokens(B, T)
    np.testing.assert_allclose(scanned(tokens), unrolled(tokens), **TOLERANCE)


def test_bfloat16_runs_close_to_float32():
    config = small.config("fusedkv", init_std=0.05)
    tokens = small.tokens(B, T)
    exact = small.decoder(config)(tokens)
    rounded = small.decoder(config.replace(dtype="bfloat16"))(tokens)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=2e-2)
