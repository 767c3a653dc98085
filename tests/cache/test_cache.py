"""Cache arrays: what is allocated, and where tokens land, against a simulation in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax import layouts
from fusedkv_jax.cache import cache_plan
from fusedkv_jax.cache.storage import ring_positions, write, write_ring

H = 3


def config(layout, **changes):
    return fkv.ModelConfig(
        vocab_size=10, num_layers=8, d_model=16, num_heads=4, num_kv_heads=2, d_ff=16,
        layout=layout, **changes,
    )  # fmt: skip


def test_half_the_layers_cache_half_the_bytes():
    sizes = {
        name: fkv.KVCache.create(config(name), batch_size=2, max_length=12).nbytes
        for name in ("mha", "fusedkv", "fusedkv_lite")
    }
    assert (
        sizes["mha"] == 2 * 8 * 2 * 12 * 2 * 4 * 4
    )  # K and V, layers, batch, tokens, heads, H, bytes
    assert sizes["fusedkv"] == sizes["fusedkv_lite"] == sizes["mha"] // 2


def test_arrays_exist_for_cached_streams_only():
    cache = fkv.KVCache.create(config("svformer"), batch_size=1, max_length=5)
    assert [a.shape[0] for a in cache.keys] == [8]
    assert [a.shape[0] for a in cache.values] == [1]
    hybrid = config("window_hybrid:window=3,full_every=2")
    cache = fkv.KVCache.create(hybrid, batch_size=1, max_length=9)
    assert [a.shape[::2] for a in cache.keys] == [(2, 9, 4), (2, 3, 4)]  # full ones, then rings
    # Readers of a ring that are never full, though another layer's window is shorter.
    plan = cache_plan(layouts.parse("0s4_1s6_0s5_k1v0s6"))
    assert plan.windows == (6,)


def test_storage_type():
    cache = fkv.KVCache.create(config("mha", dtype="bfloat16"), batch_size=1, max_length=4)
    assert cache.keys[0].dtype == jnp.bfloat16
    cache = fkv.KVCache.create(config("mha"), batch_size=1, max_length=4, dtype=jnp.bfloat16)
    assert cache.keys[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["batch_size", "max_length"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0; use a whole number of at least 1"):
        fkv.KVCache.create(config("mha"), **{"batch_size": 1, "max_length": 1, name: 0})


@pytest.mark.parametrize("new_tokens", [1, 4])
def test_write_touches_nothing_but_the_new_tokens(new_tokens):
    rng = np.random.default_rng(0)
    array = rng.normal(size=(3, 4, 6, 2, H)).astype(np.float32)
    new = rng.normal(size=(4, new_tokens, 2, H)).astype(np.float32)
    start = np.array([0, 3, 5, 2])
    count = np.array([new_tokens, min(new_tokens, 2), new_tokens, 0])  # row 2 may run past the end
    expected = array.copy()
    for row in range(4):
        for t in range(count[row]):
            if start[row] + t < 6:
                expected[1, row, start[row] + t] = new[row, t]
    found = write(jnp.asarray(array), 1, jnp.asarray(new), jnp.asarray(start), jnp.asarray(count))
    np.testing.assert_array_equal(found, expected)


def test_ring_against_a_simulation():
    """Rows advance unevenly, by nothing, by less and by more than the ring holds."""
    rng = np.random.default_rng(1)
    rows, slots = 3, 4
    ring = np.zeros((rows, slots, 1, H), np.float32)
    simulated, held = ring.copy(), np.full((rows, slots), -1)
    start = np.zeros(rows, int)
    for _ in range(12):
        count = rng.integers(0, 7, rows)
        new = rng.normal(size=(rows, 6, 1, H)).astype(np.float32)
        for row in range(rows):
            for t in range(count[row]):
                position = start[row] + t
                simulated[row, position % slots] = new[row, t]
                held[row, position % slots] = position
        ring = write_ring(
            jnp.asarray(ring), jnp.asarray(new), jnp.asarray(start), jnp.asarray(count)
        )
        start = start + count
        positions = np.asarray(ring_positions(jnp.asarray(start), slots))
        np.testing.assert_array_equal(np.maximum(positions, -1), held)
        np.testing.assert_array_equal(ring, simulated)
