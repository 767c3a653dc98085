"""MiniCache: merged directions, norms and retained tokens against formulas in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.cache.calls import Call
from fusedkv_jax.compression import CompressionError, MiniCache
from fusedkv_jax.compression.merging import merge, restore
from tests.model import small


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def spherical(a, b, t):
    """Interpolated direction and distance of two vectors, float64."""
    a, b = (np.asarray(x, float).ravel() for x in (a, b))
    norms = np.linalg.norm(a), np.linalg.norm(b)
    a, b = a / norms[0], b / norms[1]
    angle = np.arccos(np.clip(a @ b, -1, 1))
    direction = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return direction, norms, angle / np.pi


@pytest.mark.parametrize("heads", [1, 3])
def test_merge_by_the_formula(heads):
    lower, upper = draw(0, 2, 5, 4, 3, 8), draw(1, 2, 5, 4, 3, 8)
    direction, norms, distance = merge(jnp.asarray(lower), jnp.asarray(upper), 0.6, heads)
    assert norms.shape == (4, 5, 4, heads)
    for p, b, s in np.ndindex(2, 5, 4):
        for r in range(heads):
            part = slice(None) if heads == 1 else slice(r, r + 1)
            e, size, angle = spherical(lower[p, b, s, part], upper[p, b, s, part], 0.6)
            np.testing.assert_allclose(direction[p, b, s, part].ravel(), e, atol=1e-5)
            np.testing.assert_allclose(norms[2 * p : 2 * p + 2, b, s, r], size, rtol=1e-5)
            np.testing.assert_allclose(distance[p, b, s, r], angle, atol=1e-5)


def test_restored_tokens_have_the_norms_of_both_layers():
    lower, upper = draw(0, 1, 2, 6, 2, 8), 3 * draw(1, 1, 2, 6, 2, 8)
    direction, norms, _ = merge(jnp.asarray(lower), jnp.asarray(upper), 0.6, 1)
    for layer, tokens in enumerate((lower, upper)):
        found = restore(direction[0], norms[layer])
        sizes = np.linalg.norm(tokens[0].reshape(2, 6, -1), axis=-1)
        np.testing.assert_allclose(
            np.linalg.norm(found.reshape(2, 6, -1), axis=-1), sizes, rtol=1e-5
        )


def test_edges_of_the_interpolation():
    x = draw(2, 1, 1, 5, 2, 8)
    direction, norms, _ = merge(jnp.asarray(x), jnp.asarray(2 * x), 0.6, 1)
    np.testing.assert_allclose(restore(direction[0], norms[0]), x[0], atol=1e-5)
    np.testing.assert_allclose(restore(direction[0], norms[1]), 2 * x[0], atol=1e-5)
    y = draw(3, 1, 1, 5, 2, 8)
    direction, norms, _ = merge(jnp.asarray(x), jnp.asarray(y), 1.0, 1)
    np.testing.assert_allclose(restore(direction[0], norms[1]), y[0], atol=1e-5)
    zero = jnp.zeros_like(jnp.asarray(x))
    direction, norms, distance = merge(zero, zero, 0.6, 1)
    assert np.isfinite(distance).all() and not np.any(restore(direction[0], norms[0]))


@functools.cache
def dense(length=20, room=4):
    config = small.config("mha")
    model, tokens = small.decoder(config), small.tokens(2, length)
    count = jnp.array([length, 13], jnp.int32)

    def empty(dtype=None):
        return fkv.KVCache.create(config, batch_size=2, max_length=length + room, dtype=dtype)

    logits, cache = fkv.prefill(model, tokens, count, empty())
    return model, tokens, count, empty, logits, cache


def views(store, slots, length):
    """What layers read of a store, before any new token."""
    call = Call(jnp.full(2, length), jnp.zeros(2, jnp.int32), 1)
    new = jnp.zeros((2, 1, 2, 8))
    return {k: [store.view(k, s, new, call) for s in range(slots)] for k in ("key", "value")}


@pytest.mark.parametrize("budget", [3, 0.2])
def test_merged_store_holds_the_formulas_values_and_the_farthest_tokens(budget):
    model, tokens, count, empty, logits, cache = dense()
    found, merged = fkv.prefill(model, tokens, count, empty(), compression=MiniCache(budget=budget))
    np.testing.assert_array_equal(found, logits)
    assert [group.keys for group in merged.plan.groups] == [(4, 5, 6, 7), (0, 1, 2, 3)]
    read = views(merged.stores[0], 4, 20)
    whole = {"key": np.asarray(cache.keys[0]), "value": np.asarray(cache.values[0])}
    for kind in ("key", "value"):
        for pair in (0, 1):
            low, high = (whole[kind][4 + 2 * pair + one] for one in (0, 1))
            for b, length in enumerate(count):
                parts = [spherical(low[b, s], high[b, s], 0.6) for s in range(length)]
                far = np.argsort([-distance for *_, distance in parts], kind="stable")
                exact = set(
                    far[: budget if budget >= 1 else int(np.ceil(budget * length))].tolist()
                )
                for s, (direction, norms, _) in enumerate(parts):
                    for one, source in enumerate((low, high)):
                        expected = direction.reshape(2, 8) * norms[one]
                        expected = source[b, s] if s in exact else expected
                        got = read[kind][2 * pair + one][b, s]
                        np.testing.assert_allclose(got, expected, atol=1e-4)
                        if s in exact:
                            np.testing.assert_array_equal(got, source[b, s])


def test_decoding_reads_restored_tokens_and_merges_the_new_one():
    """Equal to a whole cache into which the restored tokens have been put."""
    model, tokens, count, empty, logits, cache = dense()
    _, merged = fkv.prefill(model, tokens, count, empty(), compression=MiniCache(budget=2))
    cache = jax.tree.map(jnp.copy, cache)
    for _ in range(2):
        slots = np.asarray(cache.lengths)
        read = views(merged.stores[0], 4, 20)
        store = cache.stores[0]
        store = dataclasses.replace(
            store,
            keys=jnp.concatenate([store.keys[:4], jnp.stack(read["key"])]),
            values=jnp.concatenate([store.values[:4], jnp.stack(read["value"])]),
        )
        plain = dataclasses.replace(cache, stores=(store,), lengths=jnp.asarray(slots))
        next_tokens = jnp.argmax(logits, -1).astype(jnp.int32)
        expected, cache = fkv.decode_step(model, next_tokens, plain)
        logits, merged = fkv.decode_step(model, next_tokens, merged)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        # The new token was exact for itself, and is merged for those that follow.
        e, norms, _ = spherical(*(cache.keys[0][layer, 1, slots[1]] for layer in (4, 5)), 0.6)
        found = views(merged.stores[0], 4, 20)["key"][1][1, slots[1]]
        np.testing.assert_allclose(found, e.reshape(2, 8) * norms[1], atol=1e-4)


def test_a_row_does_not_depend_on_its_padding():
    """A budget that holds the whole prompt, but not the columns that a longer one brings."""
    model, tokens, *_ = dense()
    count, found = jnp.full(2, 5, jnp.int32), []
    for columns in (5, 16):
        cache = fkv.KVCache.create(model.config, batch_size=2, max_length=20)
        prompt = jnp.zeros((2, columns), jnp.int32).at[:, :5].set(tokens[:, :5])
        logits, cache = fkv.prefill(model, prompt, count, cache, compression=MiniCache(budget=8))
        for token in range(3):
            logits, cache = fkv.decode_step(model, jnp.full(2, token, jnp.int32), cache)
        found.append(logits)
    np.testing.assert_allclose(*found, atol=1e-4)


def test_memory_is_that_of_the_formula():
    """(3.1 h + 2) / (4 h) of the whole cache, and the places of retained tokens."""
    model, tokens, count, empty, _, cache = dense()
    _, merged = fkv.prefill(model, tokens, count, empty(), compression=MiniCache(budget=0.05))
    h, length, rows = 2 * 8, 24, 2
    floats = 4 * 2 * length * h + 2 * 2 * length * h + 2 * 4 * length + 2 * 4 * 1 * h
    places = 2 * 2 * 1
    assert merged.nbytes == 4 * rows * (floats + places)
    np.testing.assert_allclose(merged.nbytes / cache.nbytes, (3.1 * h + 2) / (4 * h), atol=0.01)


def test_per_head_and_int8_storage():
    model, tokens, count, empty, logits, cache = dense()
    _, merged = fkv.prefill(
        model, tokens, count, empty("int8"), compression=MiniCache(budget=2, per_head=True)
    )
    read = views(merged.stores[0], 4, 20)
    store = jax.tree.leaves(merged.stores[0].keys)
    assert str(store[0].dtype) == "int8" and store[0].shape[:2] == (2, 2)
    whole = np.asarray(cache.keys[0])
    far = np.asarray(merged.stores[0].place_keys)[0, 0]
    for s in set(range(20)) - set(far.tolist()):
        for head in (0, 1):
            e, norms, _ = spherical(whole[4, 0, s, head], whole[5, 0, s, head], 0.6)
            found = np.asarray(read["key"][0][0, s, head])
            np.testing.assert_allclose(found, e * norms[0], atol=0.03 * norms[0])


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "2", float("nan")])
def test_bad_budgets_are_refused(budget, without_type_checks):
    with pytest.raises(CompressionError, match="budget="):
        MiniCache(budget=budget)
