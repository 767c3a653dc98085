"""Scores and choices of tokens against loops over everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.cache.calls import Piece, Reading, Rows
from fusedkv_jax.compression import scoring
from tests.model import small


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rows, slots, softcap", [(5, 40, None), (70, 1100, None), (5, 40, 0.7)])
def test_received_attention_equals_that_of_a_full_softmax(rows, slots, softcap):
    batch, heads, kv_heads, size = 2, 4, 2, 8
    q, keys = draw(0, batch, rows, heads, size), draw(1, batch, slots, kv_heads, size)
    lengths = np.array([slots, slots - 7])
    positions = lengths[:, None] - np.arange(rows, 0, -1)
    positions[1, 0] = -1  # a row that does not count
    weights = np.linspace(1, 2, rows)[None].repeat(batch, 0)
    expected = np.zeros((batch, heads, slots))
    lse = np.zeros((batch, rows, heads))
    for b in range(batch):
        for n in range(heads):
            for t in range(rows):
                if positions[b, t] < 0:
                    continue
                scores = (
                    keys[b, : positions[b, t] + 1, n // 2].astype(float) @ q[b, t, n] * size**-0.5
                )
                scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
                lse[b, t, n] = np.log(np.exp(scores).sum())
                expected[b, n, : len(scores)] += weights[b, t] * np.exp(scores - lse[b, t, n])
    q, keys, lse, places, held = map(jnp.asarray, (q, keys, lse.astype("f"), positions, lengths))
    pieces = (Piece((keys,), (keys,), {}),)
    reading = Reading(0, {}, {"key": None}, q, pieces, lse, Rows(places, None, False), softcap)
    found = scoring.received(reading, places, held, weights=jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_attention_of_a_query_adds_up_to_one_whatever_a_model_does_with_scores():
    block = fkv.config.BlockConfig(attention_softcap=0.5, attention_scale=1.3)
    model = small.decoder(small.config("fusedkv", num_layers=4, block=block))
    cache = fkv.KVCache.create(model.config, batch_size=2, max_length=12)
    count = jnp.array([12, 7])

    def watch(reading):
        places = jnp.where(reading.rows.positions < count[:, None], reading.rows.positions, -1)
        return scoring.received(reading, places, count).sum(-1)

    *_, found = model.observe(small.tokens(2, 12), count, cache, watch, rows=12)
    for layer in found:
        np.testing.assert_allclose(layer, np.broadcast_to(count[:, None], layer.shape), rtol=1e-5)


@pytest.mark.parametrize("kernel", [1, 4, 7])
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_pooling_equals_that_of_torch_on_each_row_alone(kernel, pooling):
    torch = pytest.importorskip("torch")
    scores, counted = draw(2, 3, 2, 20), np.array([20, 9, 3])
    pool = torch.nn.functional.max_pool1d if pooling == "max" else torch.nn.functional.avg_pool1d
    found = np.asarray(scoring.pool(jnp.asarray(scores), jnp.asarray(counted), kernel, pooling))
    for b, count in enumerate(counted):
        if count > kernel:
            row = torch.tensor(scores[b, :, :count])
            expected = pool(row, kernel, stride=1, padding=kernel // 2).numpy()[:, :count]
            np.testing.assert_allclose(found[b, :, :count], expected, rtol=1e-6)
        assert np.isneginf(found[b, :, count:]).all()


def test_kept_tokens_are_the_recent_and_the_best_others():
    scores = np.round(draw(3, 3, 2, 30), 1)  # with ties: the earlier token wins
    lengths, budget, recent = np.array([30, 17, 4]), 9, 3
    found = np.asarray(scoring.keep(jnp.asarray(scores), jnp.asarray(lengths), budget, recent))
    for b, length in enumerate(lengths):
        for k in range(2):
            if length <= budget:
                expected = list(range(length))
            else:
                older = sorted(range(length - recent), key=lambda s: (-scores[b, k, s], s))
                expected = sorted([*older[: budget - recent], *range(length - recent, length)])
            assert found[b, k, : len(expected)].tolist() == expected


def test_tokens_without_a_score_come_before_absent_ones():
    scores = jnp.full((1, 1, 6), -jnp.inf).at[0, 0, 1].set(0.5)
    kept = scoring.keep(scores, jnp.asarray([5]), 4, 1)
    assert kept[0, 0].tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("grouping", ["mean", "max", "sum"])
def test_query_heads_of_a_kv_head_are_grouped(grouping):
    scores = draw(4, 2, 6, 5)
    found = scoring.per_kv_head(jnp.asarray(scores), 2, grouping)
    expected = [getattr(np, grouping)(scores[:, k : k + 3], axis=1) for k in (0, 3)]
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=1e-6)
    assert jax.tree.leaves(found)[0].shape == (2, 2, 5)
