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
    state = loop.DecodeState(
        tokens=jnp.zeros((ROWS, LENGTH), jnp.int32),
        lengths=jnp.ones(ROWS, jnp.int32),
        limits=jnp.full(ROWS, 9, jnp.int32),
        stops=jnp.full((ROWS, 4), -1, jnp.int32),
        finished=jnp.zeros(ROWS, bool),
        seen=jnp.zeros((ROWS, small.VOCAB), bool),
        cache=cache,
    )
    inputs = SamplerInputs.create([fkv.SamplingParams(temperature=0)] * ROWS)
    memory = loop.decode.lower(graph, params, state, inputs).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # Single layers are copied out to be read, the whole cache is not.
    assert memory.temp_size_in_bytes < 0.75 * cache.nbytes, memory.temp_size_in_bytes / cache.nbytes
