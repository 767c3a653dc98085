"""After `warm_up` nothing compiles, whatever is asked for; the loop updates its cache in place."""

import jax
import pytest

import fusedkv_jax as fkv
from experiments.benchmarks.programs import (
    counted_compilations,
    lower_decode_loop,
    mixed_requests,
)
from fusedkv_jax.generation import generate, warm_up
from tests.model import small

LONGEST, BATCH = 32, 2


@pytest.fixture(scope="module")
def model():
    config = small.config("fusedkv", num_layers=4, d_model=16, d_ff=16)
    model = small.decoder(config)
    warm_up(model, batch_size=BATCH, max_length=LONGEST)
    return model


def test_200_mixed_prompts_compile_nothing_after_warm_up(model):
    prompts, params = mixed_requests(model.config, 200, LONGEST)
    with counted_compilations() as seconds:
        alone = [generate(model, [x], p)[0] for x, p in zip(prompts[:50], params, strict=False)]
        together = generate(model, prompts[50:], params[50:], batch_size=BATCH)
    assert len(seconds) == 0
    assert len(alone + together) == 200
    lengths = {len(found.token_ids) for found in alone + together}
    assert len(lengths) > 10  # the requests did differ


def test_a_longer_prompt_is_counted_as_compilation(model):
    """The count of the test above can fail: a bucket beyond the warm-up compiles."""
    with counted_compilations() as seconds:
        generate(model, [[1] * (LONGEST + 1)], fkv.SamplingParams(max_tokens=2, temperature=0.0))
    assert len(seconds) > 0


@pytest.mark.parametrize(
    "spec, read",
    [("mha", 2), ("fusedkv", 4), pytest.param("fusedkv_lite", 2, marks=pytest.mark.slow)],
)
def test_decode_loop_reuses_the_donated_cache(spec, read, fresh_compilation):
    """The cache is aliased to the output, and no copy of it is in temporary memory.

    What is there are the streams that one layer reads at a time, whatever the depth.
    """
    config = small.config(spec, d_model=16, d_ff=16)
    cache = jax.eval_shape(lambda: fkv.KVCache.create(config, batch_size=2, max_length=4096))
    arrays = jax.tree.leaves((cache.keys, cache.values))
    sizes = [array.size * array.dtype.itemsize for array in arrays]
    stream = sizes[0] / arrays[0].shape[0]
    memory = lower_decode_loop(config, length=4096).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(sizes)
    assert memory.temp_size_in_bytes < (read + 1.5) * stream
