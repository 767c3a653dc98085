"""Steps over pages: what they compute, and that the pool stays where it is."""

import functools
import importlib.util
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusedkv_jax as fkv
from fusedkv_jax.cache import paged
from fusedkv_jax.cache.paged import Lane, PagedCall, PagedStore, copy_pages
from fusedkv_jax.model.paging import extend_pages
from pallas_kernels import tpu
from tests.model import small

PAGE = 4


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(graph, params, pool, tokens, lanes, sampled):
    call = PagedCall.of(lanes)
    return extend_pages(nnx.merge(graph, params), tokens, call, pool, sampled)


def _lane(positions, table):
    positions = np.asarray(positions, np.int32)
    return Lane(jnp.asarray(np.tile(table, (len(positions), 1))), jnp.asarray(positions))


def _model(spec, **changes):
    return small.decoder(small.config(spec, num_layers=4, d_model=16, d_ff=16, **changes))


@pytest.mark.parametrize(
    "geometry, dtype",
    [
        ("gqa", "int8"),
        ("mla", "float32"),
        pytest.param("gqa", "float32", marks=pytest.mark.slow),
        pytest.param("mla", "int8", marks=pytest.mark.slow),
    ],
)
def test_chunks_and_decodes_in_scattered_pages_equal_a_contiguous_cache(geometry, dtype):
    """Whatever else the pool holds, NaN included."""
    model = _model("fusedkv", geometry=geometry)
    tokens = small.tokens(1, 24)
    pool = PagedStore.create(model.config, num_pages=16, page_size=PAGE, dtype=dtype)
    pool = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan if x.dtype == jnp.float32 else 77), pool)
    table = np.random.default_rng(0).permutation(16)[:8].astype(np.int32)
    graph, params = nnx.split(model)

    chunk = np.full(24, -1)  # a chunk of 20 tokens: three rows of 8
    chunk[:20] = np.arange(20)
    given = np.zeros(25, np.int32)  # one row of the decode lane is empty
    given[1:21] = tokens[0, :20]
    lanes = (_lane([[-1]], table), _lane(chunk.reshape(3, 8), table))
    found, pool = _step(graph, params, pool, jnp.asarray(given), lanes, jnp.array([[20], [-1]]))
    cache = fkv.KVCache.create(model.config, batch_size=1, max_length=32, dtype=dtype)
    expected, cache = fkv.prefill(model, tokens[:, :20], jnp.array([20]), cache)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    for place in range(20, 23):
        lanes = (_lane([[place]], table),)
        one = tokens[0, place : place + 1]
        found, pool = _step(graph, params, pool, one, lanes, jnp.array([[0]]))
        expected, cache = fkv.decode_step(model, one, cache)
        np.testing.assert_allclose(found[0], expected[0], atol=1e-5)


def test_codes_in_tiles_are_those_of_whole_pages(monkeypatch):
    """As they lie on a TPU; the same program otherwise."""
    model, table = _model("fusedkv", geometry="gqa"), np.array([2, 0], np.int32)
    graph, params = nnx.split(model)
    lanes = (_lane([[-1]], table), _lane(np.arange(40).reshape(5, 8), table))
    tokens = jnp.concatenate([jnp.zeros(1, jnp.int32), small.tokens(1, 40)[0]])
    create = functools.partial(
        PagedStore.create, model.config, num_pages=3, page_size=32, dtype="int8"
    )
    whole = create()
    monkeypatch.setattr(paged, "choice", types.SimpleNamespace(device=lambda: ("tpu", "")))
    tiled = create()
    assert tiled.keys.data.shape[2:4] == (2, 16)
    assert (tiled.num_pages, tiled.page_size) == (whole.num_pages, whole.page_size) == (3, 32)
    assert tiled.token_shape("key") == whole.token_shape("key")
    (found, tiled), (expected, whole) = (
        _step(graph, params, pool, tokens, lanes, jnp.array([[40]])) for pool in (tiled, whole)
    )
    np.testing.assert_array_equal(found, expected)
    for kind in ("keys", "values"):
        codes = getattr(whole, kind).data
        assert codes.any()
        np.testing.assert_array_equal(getattr(tiled, kind).data.reshape(codes.shape), codes)


@pytest.mark.parametrize("spec", ["fusedkv", "cla:k=2", "resformer"])
def test_the_compiled_step_has_no_copy_of_the_pool(spec, fresh_compilation):
    model = _model(spec)
    pool = jax.eval_shape(lambda: PagedStore.create(model.config, num_pages=4096, page_size=16))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pool))
    lanes = (_lane([[5], [9]], np.arange(16)), _lane([np.arange(16)], np.arange(16)))
    arguments = np.zeros(18, np.int32), lanes, np.array([[0], [17]], np.int32)
    memory = _step.lower(*nnx.split(model), pool, *arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 8


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles for a TPU")
@pytest.mark.parametrize(
    "dtype, page_size",
    [("bfloat16", 16), ("bfloat16", 128), *(("int8", size) for size in (16, 32, 64, 128))],
)
def test_a_step_for_a_tpu_has_one_kernel_for_all_lanes_and_no_copy_of_a_stream(dtype, page_size):
    config = small.config("fusedkv", num_layers=4, num_heads=8, num_kv_heads=8, head_dim=64)
    config = config.replace(dtype="bfloat16", param_dtype="bfloat16")
    graph, params = nnx.split(nnx.eval_shape(lambda: fkv.Decoder(config, rngs=nnx.Rngs(0))))
    # So many that XLA does not bring the scales of all into VMEM.
    num_pages = 2**21 // page_size
    create = functools.partial(PagedStore.create, config, num_pages=num_pages, page_size=page_size)
    with tpu.compiling_for("v5e"):
        pool = jax.eval_shape(lambda: create(dtype=dtype))
    lanes = (_lane([[5], [9]], np.arange(16)), _lane([np.arange(16)], np.arange(16)))
    arguments = jnp.zeros(18, jnp.int32), jax.tree.map(jnp.asarray, lanes), jnp.array([[0], [17]])

    def step(params, pool, tokens, lanes, sampled):
        call = PagedCall.of(lanes)
        return extend_pages(nnx.merge(graph, params), tokens, call, pool, sampled)

    compiled = tpu.compile_for("v5e", step, params, pool, *arguments, donate=(1,))
    text = compiled.as_text()
    kernels = text.count('custom_call_target="tpu_custom_call"')
    assert 0 < kernels <= config.num_layers  # scanned layers share one
    assert str(num_pages) in text
    assert not re.findall(rf"= \(?\w+\[2,{num_pages},.*? (?:copy|copy-start|transpose)\(", text)
    memory = compiled.memory_analysis()
    sizes = [x.size // x.shape[0] * x.dtype.itemsize for x in jax.tree.leaves(pool)]
    assert memory.temp_size_in_bytes < min(sizes) / 4
    assert memory.peak_memory_in_bytes - memory.argument_size_in_bytes < min(sizes) / 4


def test_pages_are_copied_one_after_the_other():
    config = small.config("mha", num_layers=2)
    store = PagedStore.create(config, num_pages=6, page_size=PAGE)
    store = jax.tree.map(lambda x: jnp.broadcast_to(jnp.arange(6.0)[:, None, None], x.shape), store)
    copied = copy_pages(store, jnp.array([1, 0, 4, 5]), jnp.array([3, 1, 0, 2]), jnp.array(3))
    assert copied.values[1, :, 0, 0].tolist() == [4, 0, 2, 1, 4, 5]


@pytest.mark.parametrize(
    "changes, dtype, message",
    [
        ({"layout": "lckv"}, None, "is cyclic"),
        ({}, "int4", "use int8"),
    ],
)
def test_what_cannot_be_paged_is_refused(changes, dtype, message):
    config = small.config(**{"spec": "mha", "geometry": "mha"} | changes)
    with pytest.raises(ValueError, match=message):
        PagedStore.create(config, num_pages=2, page_size=PAGE, dtype=dtype)
