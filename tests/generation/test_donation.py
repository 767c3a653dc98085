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
@pytest.mark.parametrize("spec", ["mha", "fusedkv"])
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
    # Single layers are copied out to be read, the whole cache is not.
    assert memory.temp_size_in_bytes < 0.75 * cache.nbytes, memory.temp_size_in_bytes / cache.nbytes
