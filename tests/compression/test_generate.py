"""Compressors from end to end, and with 8-bit storage."""

import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.compression import H2O, CompressionError, PyramidKV, SnapKV, StreamingLLM
from tests.model import small

PROMPTS = [list(range(1, 20)), list(range(30, 35))]
GREEDY = fkv.SamplingParams(temperature=0.0, max_tokens=6)


def tokens(model, **options):
    return [c.outputs[0].token_ids for c in fkv.generate(model, PROMPTS, GREEDY, **options)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "large, tiny",
    [
        (SnapKV(budget=64), SnapKV(budget=4, window=2)),
        (H2O(budget=64), H2O(budget=4)),
        (StreamingLLM(budget=64), StreamingLLM(budget=4, sinks=1)),
    ],
    ids=lambda c: f"{c.title}-{c.budget}",
)
def test_generation_with_a_large_budget_is_that_without_compression(large, tiny):
    model = small.decoder(small.config("fusedkv"))
    plain = tokens(model)
    assert tokens(model, compression=large) == plain
    shorter = tokens(model, compression=tiny)
    assert shorter != plain and [len(x) for x in shorter] == [6, 6]


@pytest.mark.slow
@pytest.mark.parametrize(
    "compressor",
    [SnapKV(budget=6, window=3), PyramidKV(budget=6, window=3, beta=4), H2O(budget=6),
     StreamingLLM(budget=6, sinks=2)],
    ids=lambda c: c.title,
)  # fmt: skip
def test_8_bit_storage_is_a_rounding_of_the_compressed_cache(compressor):
    model = small.decoder(small.config("fusedkv", init_std=0.05))
    prompts, count = small.tokens(2, 16), jnp.array([16, 11], jnp.int32)
    found, sizes = [], []
    for dtype in ("float32", "int8"):
        cache = fkv.KVCache.create(model.config, batch_size=2, max_length=20, dtype=dtype)
        logits, cache = fkv.prefill(model, prompts, count, cache, compression=compressor)
        later, cache = fkv.decode_step(model, jnp.array([3, 4], jnp.int32), cache)
        found.append(np.stack([logits, later]))
        sizes.append(cache.nbytes)
    assert 0 < np.abs(found[0] - found[1]).max() < 0.05 * found[0].std() + 0.02
    assert sizes[1] < 0.75 * sizes[0]  # at 8 channels a head, a scale of 4 bytes weighs much


def test_the_budget_of_batched_tokens_bounds_the_chunks_of_compressors():
    chunks = []

    class Recording(SnapKV):
        def compress(self, model, chunk, cache, observed):
            chunks.append(chunk.width)
            return super().compress(model, chunk, cache, observed)

    model = small.decoder(small.config("mha", num_layers=2, d_model=8, d_ff=8))
    compressor = Recording(budget=6, window=3)
    whole = tokens(model, compression=compressor)
    assert tokens(model, compression=compressor, max_num_batched_tokens=9) == whole
    assert chunks == [32, 4]  # of two rows


def test_4_bit_storage_is_refused():
    model = small.decoder(small.config("mha", head_dim=32))
    cache = fkv.KVCache.create(model.config, batch_size=1, max_length=300, dtype="int4")
    with pytest.raises(CompressionError, match="cannot be combined with an int4 cache"):
        fkv.prefill(
            model, small.tokens(1, 16), jnp.array([16], jnp.int32), cache, compression=SnapKV()
        )


def test_log_probabilities_of_prompts_are_refused():
    model = small.decoder(small.config("mha", num_layers=2, d_model=8, d_ff=8))
    params = fkv.SamplingParams(max_tokens=1, prompt_logprobs=1)
    with pytest.raises(
        fkv.generation.PromptError, match="prompt 0 has prompt_logprobs, which SnapKV"
    ):
        fkv.generate(model, [[1, 2, 3]], params, compression=SnapKV())
