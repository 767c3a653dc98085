"""Which streams keep their tokens together, and what shrinking them allocates."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.compression import CompressionError, PyramidKV, SnapKV
from fusedkv_jax.compression.token_sets import readers, refuse_windows, retain, token_sets
from tests.model import small


@pytest.mark.parametrize(
    "spec, expected",
    [
        # (layers whose keys, layers whose values are held, layers that read them)
        ("mha", [((i,), (i,), (i,)) for i in range(8)]),
        (
            "fusedkv",
            [((0, 3), (0, 3), (0, 3, 4, 5, 6, 7)), ((1,), (1,), (1,)), ((2,), (2,), (2,))],
        ),
        ("cla:k=4", [((0,), (0,), (0, 1, 2, 3)), ((4,), (4,), (4, 5, 6, 7))]),
        ("svformer", [(tuple(range(8)), (0,), tuple(range(8)))]),
        ("svformer_half", [((0, *range(2, 8)), (0,), tuple(range(8)))]),
        ("yoco:window=4", [((4,), (4,), (4, 5, 6, 7))]),
        (
            "window_hybrid:window=5,full_every=2",
            [((1, 3), (1, 3), (1, 3, 5, 7))],
        ),
    ],
)
def test_streams_that_a_layer_reads_together_are_one_set(spec, expected):
    layout = small.config(spec).kv_layout
    found = [(g.keys, g.values, readers(layout, g)) for g in token_sets(layout)]
    assert found == expected


def test_windows_on_streams_that_others_read_in_full_are_refused():
    layout = small.config("0_1_2_3_0s4x4").kv_layout
    with pytest.raises(CompressionError, match="layer 4 reads the last 4 tokens"):
        refuse_windows("SnapKV", layout, CompressionError)
    for compressor in (SnapKV(), PyramidKV()):
        with pytest.raises(CompressionError, match="layer 4"):
            compressor.check(small.config("0_1_2_3_0s4x4"))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_retained_tokens_are_those_named_for_each_head(dtype):
    config = small.config("mha")
    cache = fkv.KVCache.create(config, batch_size=2, max_length=12, dtype=dtype)
    group = token_sets(config.kv_layout)[3]
    rng = np.random.default_rng(0)
    index = np.sort(rng.permuted(np.tile(np.arange(12), (2, 2, 1)), axis=-1)[..., :5])
    filled = {}
    for kind in ("keys", "values"):
        storage = getattr(cache.stores[0], kind)
        data = storage.data if dtype == "int8" else storage
        codes = rng.integers(-100, 100, data.shape)
        filled[kind] = codes
        if dtype == "int8":
            scale = jnp.asarray(rng.random(storage.scale.shape), jnp.float32)
            storage = type(storage)(jnp.asarray(codes, jnp.int8), scale)
        else:
            storage = jnp.asarray(codes, jnp.float32)
        cache = _with(cache, kind, storage)
    lengths = jnp.array([12, 4], jnp.int32)
    cache = fkv.KVCache(cache.stores, lengths, cache.plan)
    store = retain(cache, group, jnp.asarray(index), room=3)
    assert store.dropped.tolist() == [7, 0]
    for kind in ("keys", "values"):
        found = getattr(store, kind)
        found = np.asarray(found.data if dtype == "int8" else found)
        assert found.shape == (1, 2, 8, 2, 8) and not found[:, :, 5:].any()
        for b, head in np.ndindex(2, 2):
            expected = filled[kind][3, b, index[b, head], head]
            np.testing.assert_array_equal(found[0, b, :5, head], expected)
    size = 2 * 2 * 8 * 2 * (8 + 4 if dtype == "int8" else 8 * 4)  # kinds, rows, slots, heads
    assert store.nbytes == size + 4 * 2


def _with(cache, kind, storage):
    store = dataclasses.replace(cache.stores[0], **{kind: storage})
    return dataclasses.replace(cache, stores=(store,))
