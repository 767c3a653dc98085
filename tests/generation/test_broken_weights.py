"""Weights that hold NaN: an error that says so, not token 0; and rows that are whole go on."""

import jax.numpy as jnp
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.generation import LogitsError
from tests.model import small

GREEDY = fkv.SamplingParams(temperature=0, max_tokens=4)
DRAWN = fkv.SamplingParams(seed=1, max_tokens=4)
MESSAGE = "cannot be continued: the model's logits are not finite at output token 1; its weights"


@pytest.fixture(scope="module")
def model():
    """Token 7 alone has NaN in its embedding."""
    model = small.decoder(small.config("fusedkv", num_layers=4, d_model=8, d_ff=8))
    model.embedding[...] = model.embedding[...].at[7].set(jnp.nan)
    return model


@pytest.mark.parametrize("params", [GREEDY, DRAWN])
def test_generate(model, params):
    prompts = [[1, 2], [1, 7], [3]]
    with pytest.raises(LogitsError, match=f"prompt 1 {MESSAGE}"):
        fkv.generate(model, prompts, params)
    found = fkv.generate(model, prompts, params, on_error="return")
    assert found[1].outputs == () and MESSAGE in found[1].error
    whole = [fkv.generate(model, [prompt], params)[0] for prompt in (prompts[0], prompts[2])]
    assert [found[0], found[2]] == whole
    with pytest.raises(LogitsError, match=f"prompt 0 {MESSAGE}"):
        list(fkv.stream(model, [[7]], params))


def test_speculation_and_beams(model):
    with pytest.raises(LogitsError, match=f"prompt 0 {MESSAGE}"):
        fkv.generate(model, [[7]], GREEDY, speculation=fkv.SelfSpeculation(draft_tokens=2))
    with pytest.raises(LogitsError, match="prompt 1 cannot be continued: .* on some beam"):
        fkv.beam_search(model, [[1], [7]], fkv.BeamSearchParams(beam_width=2, max_tokens=3))
