"""`generate` against a plain loop over the full forward."""

import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.generation import PromptError
from tests.model import small

GREEDY = fkv.SamplingParams(temperature=0, max_tokens=9)
PROMPTS = [[5, 9, 2], [1], [7, 7, 3, 0, 11, 4, 8, 2, 6, 30, 12, 13, 14, 15, 16, 17, 18, 19]]


def by_full_forward(model, prompt, count):
    """Greedy continuation by running the whole sequence for every token."""
    length = 32
    row = list(prompt)
    for _ in range(count):
        padded = jnp.asarray([row + [0] * (length - len(row))])
        row.append(int(model(padded)[0, len(row) - 1].argmax()))
    return tuple(row[len(prompt) :])


@pytest.mark.parametrize(
    "spec", [pytest.param(s, id=n, marks=small.marks(n)) for n, s in small.SPECS.items()]
)
def test_greedy_is_the_likeliest_by_the_full_forward(spec):
    if spec.startswith("lckv"):
        spec = "lckv:forward_passes=31"  # exact up to the longest bucket used here
    model = small.decoder(small.config(spec))
    completions = fkv.generate(model, PROMPTS, GREEDY)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.token_ids == by_full_forward(model, prompt, 9)
        assert completion.prompt_token_ids == tuple(prompt)
        assert completion.finish_reason == "length"


@pytest.fixture(scope="module")
def model():
    return small.decoder(small.config("fusedkv"))


def test_buckets_change_nothing(model):
    exact = fkv.generate(model, PROMPTS, GREEDY, bucketing=False)
    assert exact == fkv.generate(model, PROMPTS, GREEDY)


def test_a_request_does_not_depend_on_its_batch(model):
    params = fkv.SamplingParams(seed=3, max_tokens=9, top_k=20, repetition_penalty=1.3)
    together = fkv.generate(model, [*PROMPTS, PROMPTS[0]], params)
    assert together[0] == together[3]
    for prompt, completion in zip(PROMPTS, together, strict=False):
        assert fkv.generate(model, [prompt], params) == [completion]
    assert fkv.generate(model, PROMPTS, params, batch_size=1) == together[:3]
    other = fkv.generate(model, PROMPTS, fkv.SamplingParams(seed=4, max_tokens=9, top_k=20))
    assert other != together[:3]


def test_requests_with_different_parameters(model):
    params = [GREEDY, fkv.SamplingParams(seed=1, max_tokens=3), GREEDY]
    completions = fkv.generate(model, PROMPTS, params)
    assert [len(c.token_ids) for c in completions] == [9, 3, 9]
    assert completions[2] == fkv.generate(model, PROMPTS[2:], GREEDY)[0]


def test_stop_tokens(model):
    whole = fkv.generate(model, PROMPTS[:1], GREEDY)[0].token_ids
    stop = whole[4]
    end = whole.index(stop) + 1
    for kwargs in (
        dict(params=fkv.SamplingParams(temperature=0, max_tokens=9, stop_token_ids=(stop,))),
        dict(params=GREEDY, eos_id=stop),
    ):
        completion = fkv.generate(model, PROMPTS[:1], **kwargs)[0]
        assert completion.token_ids == whole[:end] and completion.finish_reason == "stop"
    ignoring = fkv.SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    assert fkv.generate(model, PROMPTS[:1], ignoring, eos_id=stop)[0].token_ids == whole


class Letters:
    """A tokenizer of the letters a to z; `.` ends a text."""

    eos_id = 26

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids):
        return "".join(chr(ord("a") + i % 26) for i in ids)


def test_texts(model):
    by_ids = fkv.generate(model, [[0, 1, 2]], GREEDY)[0]
    by_text = fkv.generate(model, ["abc"], GREEDY, tokenizer=Letters())[0]
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.text == Letters().decode(by_ids.token_ids)


def test_texts_begin_as_documents_do_in_training(model):
    """With the tokenizer's BOS token, unless that is turned off; beams and streams alike."""

    class Documents(Letters):
        bos_id = 27

    asked = {"tokenizer": Documents()}
    (found,) = fkv.generate(model, ["abc"], GREEDY, **asked)
    assert found.prompt_token_ids == (27, 0, 1, 2)
    (plain,) = fkv.generate(model, ["abc"], GREEDY, add_special_tokens=False, **asked)
    assert plain.prompt_token_ids == (0, 1, 2)
    (beam,) = fkv.beam_search(model, ["abc"], fkv.BeamSearchParams(beam_width=1), **asked)
    assert beam.prompt_token_ids == (27, 0, 1, 2)


def test_output_is_cut_at_the_context(model):
    prompt = np.arange(60) % small.VOCAB
    completion = fkv.generate(model, [prompt], GREEDY)[0]
    assert len(completion.token_ids) == 4 and completion.finish_reason == "length"


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([[]], "prompt 0 is empty"),
        ([[1], [2, 61]], "prompt 1 has token id 61; ids are 0 to 60"),
        ([[-1]], "prompt 0 has token id -1"),
        ([[0] * 64], "prompt 0 has 64 tokens, the model's context of 64 leaves no room"),
        (["text"], "prompt 0 is text; pass tokenizer="),
    ],
)
def test_bad_prompts_are_one_clear_line(model, prompts, message):
    with pytest.raises(PromptError, match=message):
        fkv.generate(model, prompts, GREEDY)


def test_prefill_into_a_small_cache_is_refused(model):
    cache = fkv.KVCache.create(model.config, batch_size=1, max_length=4)
    with pytest.raises(ValueError, match="5 columns but the cache holds 4"):
        fkv.prefill(model, jnp.zeros((1, 5), jnp.int32), jnp.array([5]), cache)


def test_rings_take_prompts_longer_than_themselves():
    """Where every layer is windowed, nothing limits a row."""
    model = small.decoder(small.config("0s4_1s4_2s4_3s4", num_layers=4))
    tokens = small.tokens(1, 11)
    cache = fkv.KVCache.create(model.config, batch_size=1, max_length=8)
    last, cache = fkv.prefill(model, tokens[:, :10], jnp.array([10]), cache)
    whole = model(tokens)
    np.testing.assert_allclose(last, whole[:, 9], atol=1e-4)
    last, _ = fkv.decode_step(model, tokens[:, 10], cache)
    np.testing.assert_allclose(last, whole[:, 10], atol=1e-4)
