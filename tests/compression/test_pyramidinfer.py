"""PyramidInfer against a NumPy decoder that runs layer by layer and drops hidden states."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.compression import CompressionError, PyramidInfer
from fusedkv_jax.compression.budgets import pyramid_lengths
from tests.oracles.decoder import build, draw, rms_norm, rotated, small_config

LENGTHS, LATER = np.array([160, 100], np.int32), 2
SHARE, INTERVAL = 0.6, 2
TOKENS = np.random.default_rng(5).integers(0, 37, (2, 160 + LATER)).astype(np.int32)


def heads(p, name, x, positions, norm):
    found = np.einsum("td,dnh->tnh", rms_norm(x, p["attention_norm"]), p[name])
    if norm is None:
        return found
    found = rms_norm(found, p[norm])
    return np.stack([rotated(h, at) for h, at in zip(found, positions, strict=True)])


def layer(p, x, positions, stored):
    """One layer for some tokens, after those that are stored; and the probabilities."""
    q = heads(p, "q_proj", x, positions, "q_norm")
    stored[0].extend(heads(p, "k_proj", x, positions, "k_norm"))
    stored[1].extend(heads(p, "v_proj", x, positions, None))
    keys, values = (np.repeat(np.stack(parts), 2, axis=1) for parts in stored)
    scores = np.einsum("tnh,snh->nts", q, keys) / np.sqrt(8)
    before = len(keys) - len(x)
    scores[:, np.arange(len(x))[:, None] + before < np.arange(len(keys))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    x = x + np.einsum("nts,snh,nhd->td", weights, values, p["o_proj"])
    normed = rms_norm(x, p["mlp_norm"])
    gate, up = normed @ p["gate"], normed @ p["up"]
    return x + (gate / (1 + np.exp(-gate)) * up) @ p["down"], weights


def simulate(drawn, tokens, length):
    """Logits from the prompt's last token on, and the tokens that each layer has stored."""
    x, positions = drawn.embedding[tokens[:length]].astype(np.float64), np.arange(length)
    recent = 1 + int(0.2 * length)
    caches, entered = [], []
    for i, p in enumerate(drawn.layers):
        caches.append(([], []))
        entered.append(len(x))
        x, weights = layer(p, x, positions, caches[-1])
        if i % INTERVAL:
            continue
        share = (1 - SHARE) * (np.cos(np.pi * i / 6) + 1) / 2 + SHARE
        context = len(x) - recent
        if int(context * share) <= 64:
            continue
        score = weights.mean(0)[-recent:] * np.linspace(1, 1.2, recent)[:, None]
        score = score.mean(0)[:context]
        score[:4] = np.inf
        best = np.argsort(-score, kind="stable")[: int(context * share)]
        index = np.concatenate([np.sort(best), np.arange(context, len(x))])
        x, positions = x[index], positions[index]
    found = [rms_norm(x[-1], drawn.final_norm) @ drawn.head]
    for t in range(length, length + LATER):
        x = drawn.embedding[tokens[t : t + 1]].astype(np.float64)
        for p, cache in zip(drawn.layers, caches, strict=True):
            x, _ = layer(p, x, np.array([t]), cache)
        found.append(rms_norm(x[0], drawn.final_norm) @ drawn.head)
    return np.stack(found), entered


@functools.cache
def model():
    config = small_config("mha")
    drawn = draw(config)
    return build(config, drawn), drawn


def test_pruned_prefill_and_decoding_equal_the_simulation():
    decoder, drawn = model()
    cache = fkv.KVCache.create(decoder.config, batch_size=2, max_length=160 + LATER)
    prompts = np.where(np.arange(160) < LENGTHS[:, None], TOKENS[:, :160], 0)
    arrays = map(jnp.asarray, (prompts, LENGTHS))
    compressor = PyramidInfer(budget=SHARE, interval=INTERVAL)
    found, cache = fkv.prefill(decoder, *arrays, cache, compression=compressor)
    found, held = [found], [np.asarray(store.dropped) for store in cache.stores]
    widths = [store.keys.shape[2] for store in cache.stores]
    for step in range(LATER):
        token = TOKENS[np.arange(2), LENGTHS + step]
        out, cache = fkv.decode_step(decoder, jnp.asarray(token), cache)
        found.append(out)
    for b, length in enumerate(LENGTHS):
        expected, entered = simulate(drawn, TOKENS[b], length)
        np.testing.assert_allclose(np.stack(found)[:, b], expected, atol=5e-4)
        kept = [length - int(held[cache.plan.places["key", i][0]][b]) for i in range(6)]
        assert kept == entered and entered[-1] < length
    table = pyramid_lengths(160, 6, SHARE, INTERVAL)
    assert sorted(widths) == sorted({int(w) + LATER for w in table.max(0)})  # what is allocated


@pytest.mark.parametrize("fields", [dict(budget=0), dict(budget=1.1), dict(interval=0)])
def test_bad_fields_are_refused(fields, without_type_checks):
    with pytest.raises(CompressionError, match=next(iter(fields))):
        PyramidInfer(**fields)
