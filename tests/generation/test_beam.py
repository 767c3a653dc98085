"""Beam search against every sequence there is, and against a plain search over the full forward."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.generation import chunked_prefill
from tests.model import small

VOCAB, STOP, MOST = 4, 0, 4
PROMPTS = [[1, 2], [3], [2, 2, 1, 3, 0], [1], [0, 1], [3, 1, 2], [2], [1, 1, 1]]


@pytest.fixture(scope="module")
def model():
    config = small.config("fusedkv", vocab_size=VOCAB, num_layers=4, init_std=0.6)
    return small.decoder(config)


@pytest.fixture(scope="module")
def logprobs(model):
    """Of every continuation of the prompts, by the full forward: {prompt: {output: its steps}}."""
    outputs = np.array(list(itertools.product(range(VOCAB), repeat=MOST)), np.int32)
    found = []
    for prompt in PROMPTS:
        rows = np.zeros((len(outputs), 12), np.int32)
        rows[:, : len(prompt)] = prompt
        rows[:, len(prompt) : len(prompt) + MOST] = outputs
        logits = np.asarray(model(jnp.asarray(rows)), np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.arange(len(prompt) - 1, len(prompt) - 1 + MOST)
        steps = np.take_along_axis(logits[:, places], outputs[:, :, None], axis=2)[:, :, 0]
        found.append({tuple(o): s for o, s in zip(outputs.tolist(), steps, strict=True)})
    return found


def log_probability(table, output):
    full = (*output, *[0] * (MOST - len(output)))
    return table[full][: len(output)].sum()


def complete(outputs):
    """Outputs that end with the stop token, or at the length limit."""
    return {o[: o.index(STOP) + 1] if STOP in o else o for o in outputs}


def check(completion, expected, table, stops=(STOP,)):
    """`expected`: (output, score), best first."""
    assert [o.token_ids for o in completion.outputs] == [output for output, _ in expected]
    for found in completion.outputs:
        assert found.cumulative_logprob == pytest.approx(
            log_probability(table, found.token_ids), abs=1e-4
        )
        assert found.finish_reason == ("stop" if found.token_ids[-1] in stops else "length")


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.5, -0.5])
def test_as_many_beams_as_sequences_find_the_best_of_all(model, logprobs, penalty):
    params = fkv.BeamSearchParams(
        beam_width=VOCAB ** (MOST - 1),
        n=12,
        max_tokens=MOST,
        length_penalty=penalty,
        early_stopping="never",
    )
    completions = fkv.beam_search(model, PROMPTS, params, eos_id=STOP, batch_size=512)
    for completion, table in zip(completions, logprobs, strict=True):
        scores = {o: log_probability(table, o) / len(o) ** penalty for o in complete(table)}
        best = sorted(scores.items(), key=lambda item: -item[1])
        check(completion, best[:12], table)


def plain_beam_search(table, params):
    """One prompt, lists and sorting only; see `beam_search` for the rules."""
    width, stops = params.beam_width, {STOP, *params.stop_token_ids}
    going, done = [((), 0.0)], []
    for length in range(1, MOST + 1):
        grown = [
            (output + (token,), log_probability(table, output + (token,)))
            for output, _ in going
            for token in range(VOCAB)
        ]
        grown.sort(key=lambda item: -item[1])
        for output, total in grown[:width]:
            if output[-1] in stops or length == MOST:
                done.append((output, total / length**params.length_penalty))
        done = sorted(done, key=lambda item: -item[1])[:width]
        going = [item for item in grown if item[0][-1] not in stops][:width]
        if len(done) == width and going:
            hope = going[0][1] / length**params.length_penalty
            if params.early_stopping == "never" and params.length_penalty > 0:
                hope = going[0][1] / MOST**params.length_penalty
            if params.early_stopping is True or hope <= done[-1][1]:
                break
    return done


@pytest.mark.parametrize("early", [True, False, "never"])
def test_few_beams(model, logprobs, early):
    outcomes = set()
    for penalty in (0.0, 1.0, 3.0):
        params = fkv.BeamSearchParams(
            beam_width=2, max_tokens=MOST, length_penalty=penalty, early_stopping=early
        )
        completions = fkv.beam_search(model, PROMPTS, params, eos_id=STOP)
        for completion, table in zip(completions, logprobs, strict=True):
            check(completion, plain_beam_search(table, params), table)
            outcomes.add((completion.prompt_token_ids, *(o.token_ids for o in completion.outputs)))
        alone = [fkv.beam_search(model, [p], params, eos_id=STOP)[0] for p in PROMPTS]
        for one, other in zip(alone, completions, strict=True):
            assert [o.token_ids for o in one.outputs] == [o.token_ids for o in other.outputs]
    assert len(outcomes) > len(PROMPTS)  # the penalty did matter


def test_beams_go_on_beside_any_number_of_stop_tokens(model, logprobs):
    """The best continuations may all end their outputs; what goes on is found among the others."""
    for other in range(1, VOCAB):
        params = fkv.BeamSearchParams(
            beam_width=2,
            max_tokens=MOST,
            length_penalty=4.0,
            early_stopping="never",
            stop_token_ids=[other],
        )
        completions = fkv.beam_search(model, PROMPTS, params, eos_id=STOP)
        for completion, table in zip(completions, logprobs, strict=True):
            check(completion, plain_beam_search(table, params), table, (STOP, other))


def test_one_beam_is_greedy(model):
    beam = fkv.beam_search(model, PROMPTS, fkv.BeamSearchParams(beam_width=1, max_tokens=6))
    greedy = fkv.generate(model, PROMPTS, fkv.SamplingParams(temperature=0, max_tokens=6))
    assert [c.token_ids for c in beam] == [c.token_ids for c in greedy]


@pytest.mark.parametrize(
    "field, value",
    [
        ("beam_width", 0),
        ("n", 5),
        ("n", 0),
        ("max_tokens", 0),
        ("length_penalty", float("inf")),
        ("early_stopping", "always"),
        ("stop_token_ids", (-1,)),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_values_out_of_bounds_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}=.*; use"):
        fkv.BeamSearchParams(**{field: value})


def test_steps_of_prefill_keep_within_their_budget(model, monkeypatch):
    """The arrays of a step, padding included: never more rows than it may have tokens."""
    sizes, params = [], fkv.BeamSearchParams(beam_width=2, max_tokens=2)
    extend = chunked_prefill.extend

    def counted(graph, weights, tokens, *rest):
        sizes.append(tokens.size)
        return extend(graph, weights, tokens, *rest)

    monkeypatch.setattr(chunked_prefill, "extend", counted)
    found = fkv.beam_search(model, PROMPTS, params, max_num_batched_tokens=4)
    assert max(sizes) == 4
    whole = fkv.beam_search(model, PROMPTS, params)
    assert max(sizes) > 4
    assert [[x.token_ids for x in c.outputs] for c in found] == [
        [x.token_ids for x in c.outputs] for c in whole
    ]
