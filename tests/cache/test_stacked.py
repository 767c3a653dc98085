"""The store that TPU kernels read in place: the same tokens as in the plain one, on any device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusedkv_jax as fkv
from fusedkv_jax.cache import cache_shardings
from fusedkv_jax.cache.cache import unstacked
from fusedkv_jax.cache.stacked import StackedStore
from fusedkv_jax.cache.stores import LinearStore
from fusedkv_jax.sharding import MeshConfig, make_mesh
from pallas_kernels import choice


def config_of(layout, **options):
    sizes: dict[str, Any] = {
        "num_layers": 4,
        "d_model": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
    }
    return fkv.ModelConfig(vocab_size=64, d_ff=32, layout=layout, **sizes | options)


def create(config, monkeypatch, device="tpu", dtype=None, max_length=30):
    """The cache that `device` gets; what reads it runs on the CPU."""
    with monkeypatch.context() as patch:
        patch.setattr(choice, "device", lambda: (device, ""))
        return fkv.KVCache.create(config, batch_size=4, max_length=max_length, dtype=dtype)


def run(model, cache):
    """Logits of prompts and of one more token, and the cache after them."""
    tokens = np.random.default_rng(0).integers(0, 64, (4, 24)).astype(np.int32)
    first, cache = fkv.prefill(model, jnp.asarray(tokens), jnp.asarray([8, 3, 1, 7]), cache)
    second, cache = fkv.decode_step(model, jnp.arange(4), cache)
    return jnp.stack([first, second]), cache


@pytest.mark.parametrize("layout", ["fusedkv", "yoco"])
def test_reads_and_holds_what_the_plain_store_does(layout, monkeypatch):
    model = fkv.Decoder(config_of(layout), rngs=nnx.Rngs(0))
    cache = create(model.config, monkeypatch)
    assert all(isinstance(store, StackedStore) for store in cache.stores)
    plain = create(model.config, monkeypatch, "cpu")
    assert (cache.nbytes, cache.capacity) == (plain.nbytes, plain.capacity)
    (logits, cache), (wanted, plain) = run(model, cache), run(model, plain)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    apart = unstacked(cache)
    assert all(type(store) is LinearStore for store in apart.stores)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)  # noqa: E731
    jax.tree.map(close, apart.stores, plain.stores)


def test_on_a_mesh_rows_and_heads_are_split_as_ever(monkeypatch):
    model = fkv.Decoder(config_of("fusedkv"), rngs=nnx.Rngs(0))
    wanted, _ = run(model, create(model.config, monkeypatch, "cpu"))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])):
        cache = create(model.config, monkeypatch)
        cache = jax.device_put(cache, cache_shardings(cache, jax.sharding.get_mesh()))
        logits, cache = run(model, cache)
    assert cache.keys[0].sharding.shard_shape(cache.keys[0].shape) == (2, 2, 30, 64)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "int8"}, {"head_dim": 16}, {"attention": "xla"}],  # two heads of 16 fill no lanes
)
def test_what_no_kernel_reads_in_place_is_stored_as_ever(options, monkeypatch):
    dtype = options.get("dtype")
    others = {name: value for name, value in options.items() if name != "dtype"}
    cache = create(config_of("fusedkv", **others), monkeypatch, dtype=dtype)
    assert all(type(store) is LinearStore for store in cache.stores)


@pytest.mark.parametrize(("dtype", "room"), [("float32", 4104), ("bfloat16", 4112)])
def test_rows_of_long_caches_are_whole_tiles(dtype, room, monkeypatch):
    cache = create(config_of("fusedkv"), monkeypatch, dtype=dtype, max_length=4097)
    assert cache.capacity == room
