"""The decode loop updates the cache in place: donated, and never copied whole."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import fusedkv_jax as fkv
from fusedkv_jax.generation import loop
from fusedkv_jax.generation.sampling import SamplerInputs
from tests.model import small

ROWS, LENGTH = 2, 512


@pytest.mark.usefixtures("fresh_compilation")
@pytest.mark.parametrize("spec", [pytest.param("mha", marks=pytest.mark.slow), "fusedkv"])
def test_cache_is_aliased_and_not_copied(spec):
    config = small.config(spec, max_length=LENGTH)
    graph, params = nnx.split(small.decoder(config))
    cache = fkv.KVCache.create(config, batch_size=ROWS, max_length=LENGTH)
    state = loop.DecodeState.create(
        jnp.zeros((ROWS, LENGTH), jnp.int32),
        loop.Bounds(
            jnp.ones(ROWS, jnp.int32),
            jnp.full(ROWS, 9, jnp.int32),
            jnp.full((ROWS, 4), -1, jnp.int32),
        ),
        cache,
        small.VOCAB,
    )
    inputs = SamplerInputs.create([fkv.SamplingParams(temperature=0)] * ROWS)
    state = jax.tree.map(jnp.copy, state)  # lengths stand in it twice: donated once each
    memory = loop.decode.lower(graph, params, state, inputs).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # Single streams may be cut out to be read, the whole cache is not.
    assert memory.temp_size_in_bytes < 0.75 * cache.nbytes, memory.temp_size_in_bytes / cache.nbytes


@pytest.mark.usefixtures("fresh_compilation")
@pytest.mark.parametrize("spec", ["mha", "fusedkv"])
def test_a_long_cache_is_read_in_place(spec):
    config = small.config(spec, max_length=16384)
    graph, params = nnx.split(small.decoder(config))
    cache = jax.eval_shape(
        lambda: fkv.KVCache.create(config, batch_size=8, max_length=config.max_length)
    )

    def step(params, tokens, cache):
        return fkv.decode_step(nnx.merge(graph, params), tokens, cache)

    tokens = jax.ShapeDtypeStruct((8,), jnp.int32)
    compiled = jax.jit(step, donate_argnums=2).lower(params, tokens, cache).compile()
    memory = compiled.memory_analysis()
    stream = cache.keys[0]
    of_one = stream.size * stream.dtype.itemsize // stream.shape[0]
    assert memory.temp_size_in_bytes < of_one, memory.temp_size_in_bytes / of_one
