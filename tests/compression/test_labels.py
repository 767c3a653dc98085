"""Double Sparsity: label codes, calibration and the tokens that are read, against NumPy."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.compression import CompressionError, DoubleSparsity
from fusedkv_jax.compression.labels import Labels, encode_labels, label_scores
from tests.model import small


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def decoded(labels):
    codes = np.asarray(labels.codes)
    codes = np.concatenate([codes & 15, codes >> 4], axis=-2).astype(float)
    scale, zero = (np.asarray(x, float)[..., None, :] for x in (labels.scale, labels.zero))
    return codes * scale + zero  # [..., c, S]


def test_codes_are_off_by_at_most_half_a_step_and_constant_tokens_exact():
    x = draw(0, 3, 4, 50)
    x[0, :, 7] = 0.5
    codes, scale, zero = encode_labels(jnp.asarray(x))
    assert codes.dtype == jnp.uint8 and codes.shape == (3, 2, 50)
    labels = Labels(codes, scale, zero, None)
    step = np.asarray(scale, float)[:, None]
    assert (np.abs(decoded(labels) - x) <= 0.5 * step + 4e-3).all()
    np.testing.assert_array_equal(decoded(labels)[0, :, 7], 0.5)
    span = x.max(1) - x.min(1)
    np.testing.assert_allclose(np.asarray(scale, float)[1:], span[1:] / 15, rtol=2e-3)


def test_scores_are_those_of_the_labeled_channels():
    keys, q = draw(1, 3, 2, 20, 2, 8), draw(2, 2, 6, 8)
    channels = np.random.default_rng(3).permuted(np.tile(np.arange(8), (3, 2, 2, 1)), axis=-1)
    channels = channels[..., :4]
    labels = Labels.of(jnp.asarray(keys), jnp.asarray(channels))
    found = label_scores(labels.select(1), jnp.asarray(q))
    for b, head in np.ndindex(2, 2):
        chosen = channels[1, b, head]
        group = q[b, 3 * head : 3 * head + 3][:, chosen]
        expected = (group @ decoded(labels)[1, b, head] / 2).mean(0)
        np.testing.assert_allclose(found[b, head], expected, atol=1e-5)
        exact = (group @ keys[1, b, :, head][:, chosen].T / 2).mean(0)
        assert np.abs(expected - exact).max() < 0.5  # and so near those of the keys


def test_new_tokens_get_the_labels_that_they_would_have_had():
    keys, channels = jnp.asarray(draw(4, 2, 2, 9, 2, 8)), jnp.zeros((2, 2, 2, 4), jnp.int32)
    channels = channels + jnp.array([5, 0, 3, 6])
    whole = Labels.of(keys, channels)
    part = Labels.of(keys.at[:, :, 6:].set(0), channels)
    start, count = jnp.array([6, 6]), jnp.array([3, 1])
    for slot in (0, 1):
        part = part.write(slot, keys[slot, :, 6:], start, count)
    np.testing.assert_allclose(decoded(part)[:, 0], decoded(whole)[:, 0], atol=1e-6)
    np.testing.assert_allclose(
        decoded(part)[:, 1, ..., :7], decoded(whole)[:, 1, ..., :7], atol=1e-6
    )
    assert not decoded(part)[:, 1, ..., 7:].any()


@functools.cache
def model():
    return small.decoder(small.config("mha"))


def test_calibration_ranks_channels_by_their_mean_product():
    tokens = small.tokens(2, 12)
    found = {}

    def watch(reading):
        return reading.q, reading.pieces[0].keys[0]

    cache = fkv.KVCache.create(model().config, batch_size=2, max_length=12)
    *_, seen = model().observe(tokens, jnp.full(2, 12), cache, watch, rows=12)
    compressor = DoubleSparsity(budget=4, group_factor=4)
    found = compressor.calibrate(model(), tokens).channels
    assert np.shape(found) == (6, 2, 2) and compressor.channels is None
    for slot, layer in enumerate(range(2, 8)):  # the first two layers stay dense
        q, keys = (np.asarray(x, float) for x in seen[layer])
        for head in (0, 1):
            total = np.zeros(8)
            for n in (2 * head, 2 * head + 1):
                for b in (0, 1):
                    pairs = np.abs(q[b, :, None, n] * keys[b, None, :, head])  # every pair
                    total += pairs.mean((0, 1))
            assert set(found[slot][head]) == set(np.argsort(-total)[:2].tolist())


def test_decoding_reads_the_tokens_whose_labels_score_highest():
    """Against dense attention over the tokens that the labels choose, recomputed here."""
    config = model().config
    tokens, count = small.tokens(2, 16), jnp.array([16, 9], jnp.int32)
    cache = fkv.KVCache.create(config, batch_size=2, max_length=20)
    compressor = DoubleSparsity(budget=5, group_factor=2).calibrate(model(), tokens)
    logits, sparse = fkv.prefill(model(), tokens, count, cache, compression=compressor)
    whole, cache = fkv.prefill(model(), tokens, count, cache)
    np.testing.assert_array_equal(logits, whole)  # prompts are read in full
    held = sparse.nbytes
    streams, channels = 6, 4
    labels = 2 * 2 * 20 * streams * (channels // 2 + 2 * 2)  # codes, and scale and zero in 16 bits
    assert held - cache.nbytes == labels + 4 * streams * 2 * 2 * channels
    token = jnp.argmax(logits, -1).astype(jnp.int32)

    def watch(reading):
        return reading.q, reading.pieces[0], reading.lse

    _, after, seen = model().observe(token[:, None], jnp.ones(2, jnp.int32), sparse, watch)
    group = {layer: slot for slot, layer in enumerate(after.plan.groups[0].keys)}
    for layer, slot in group.items():
        q, piece, lse = seen[layer]
        store = after.stores[0]
        assert piece.keys[0].shape == (2, 5, 2, 8)
        for b, length in enumerate(np.asarray(count) + 1):
            for head in (0, 1):
                chosen = np.asarray(store.labels.channels)[slot, b, head]
                mean = np.asarray(q, float)[b, 0, 2 * head : 2 * head + 2].mean(0)[chosen]
                score = mean @ decoded(store.labels)[slot, b, head][:, :length]
                best = np.argsort(-score, kind="stable")[:5]
                for name, own in (("keys", store.keys), ("values", store.values)):
                    got = np.asarray(getattr(piece, name)[0])[b, :, head]
                    expected = np.asarray(own)[slot, b, best, head]
                    np.testing.assert_array_equal(
                        got[np.lexsort(got.T)], expected[np.lexsort(expected.T)]
                    )
                for n in (2 * head, 2 * head + 1):
                    keys = np.asarray(store.keys, float)[slot, b, best, head]
                    scores = keys @ np.asarray(q, float)[b, 0, n] / 8**0.5
                    np.testing.assert_allclose(
                        lse[b, 0, n], np.log(np.exp(scores).sum()), atol=1e-4
                    )


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(budget=0), "budget=0"),
        (dict(group_factor=0), "group_factor=0"),
        (dict(dense_layers=-1), "dense_layers=-1"),
        (dict(mode="kq"), "mode='kq'"),
    ],
)
def test_bad_fields_are_refused(fields, message, without_type_checks):
    with pytest.raises(CompressionError, match=message):
        DoubleSparsity(**fields)


@pytest.mark.parametrize(
    "spec, fields, message",
    [
        ("mha", dict(group_factor=8), "group_factor=8 does not give an even number"),
        ("mha", dict(dense_layers=8), "lower dense_layers"),
        ("mha", dict(channels=(((0, 1),) * 2,)), "calibrate with this model"),
        ("mha", dict(dense_layers=5, channels=(((0, 8),) * 2,) * 3), "channel 8 of a key of 8"),
        ("mha", dict(dense_layers=5, channels=(((0, -1),) * 2,) * 3), "channel -1 of a key of 8"),
        ("svformer", {}, "read by one of the first dense_layers=2"),
    ],
)
def test_models_that_gain_nothing_are_refused(spec, fields, message):
    with pytest.raises(CompressionError, match=message):
        DoubleSparsity(budget=4, **fields).check(small.config(spec))
