"""Engines that guess tokens and check several at once: what they answer stays as it is."""

import dataclasses
import functools

import numpy as np
import pytest

import fusedkv_jax as fkv
from experiments.benchmarks.programs import counted_compilations
from fusedkv_jax.serving import POLICIES, StepShapes
from fusedkv_jax.serving.speculation import NGrams
from tests.model import small
from tests.serving.served import GREEDY, Json, odd_params, prompts, run, tokens
from tests.serving.served import engine as plain

NGRAM = fkv.NGramSpeculation(draft_tokens=3, prompt_lookup_min=1)
SELF = fkv.SelfSpeculation(draft_tokens=3)


@functools.cache
def model(spec="fusedkv", geometry="gqa"):
    """One whose upper layers change little, so that drafts are right now and then."""
    model = small.decoder(small.config(spec, geometry, num_layers=4, d_model=16, d_ff=16))
    for blocks in model.runs:
        for block in blocks:
            for parameter in (block.attention.o_proj, block.mlp.down):
                parameter.set_value(0.3 * parameter[...])
    return model


def engine(speculation=NGRAM, model_=None, **changes):
    """One whose pool is small."""
    settings = dict(num_pages=30, speculation=speculation) | changes
    return plain(model_ or model(), **settings)


def given():
    """Prompts that repeat themselves, and some that do not."""
    return [prompt * 2 if len(prompt) < 14 else prompt for prompt in prompts(33)]


def params():
    """All that a request may ask for, and greedy ones between."""
    form = fkv.StructuredOutputsParams(regex="(ab|ac)*[d-f]{3}")
    greedy = dataclasses.replace(GREEDY, logprobs=2, stop=["zz", "a"])
    held = fkv.SamplingParams(temperature=1.0, seed=9, max_tokens=12, structured_outputs=form)
    several = fkv.SamplingParams(n=3, temperature=0.5, seed=7, max_tokens=11, prompt_logprobs=1)
    return [*odd_params(), GREEDY, held, greedy, several, dataclasses.replace(held, temperature=0)]


def outputs(found):
    """What every request was given: tokens, text, ends, places of log-probabilities."""
    return {
        name: [
            (
                tokens(deltas, i),
                "".join(d.text for d in deltas if d.index == i),
                [(d.finish_reason, d.stop_reason) for d in deltas if d.index == i][-1],
                [list(p) for d in deltas if d.index == i for p in d.logprobs or ()],
            )
            for i in sorted({d.index for d in deltas})
        ]
        for name, deltas in found.items()
    }


@functools.cache
def expected():
    """Of an engine that guesses nothing and has room for all."""
    return outputs(run(plain(model(), tokenizer=Json()), given(), params() * 3))


@pytest.mark.parametrize(
    "speculation, how",
    [
        (NGRAM, "recompute"),
        (SELF, "swap"),
        pytest.param(NGRAM, "swap", marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(SELF, adaptive=True), "recompute", marks=pytest.mark.slow),
    ],
)
def test_outputs_are_those_of_plain_decoding_whatever_is_asked_for(speculation, how):
    """Also of requests that give up their pages."""
    policy = POLICIES["fcfs"](on_eviction=how)
    served = engine(speculation, policy=policy, host_pages=200, tokenizer=Json())
    assert outputs(run(served, given(), params() * 3)) == expected()
    stats = served.stats()
    assert stats.preemptions > 0 and 0 < stats.accepted_tokens <= stats.draft_tokens


def test_the_prefix_cache_has_what_was_accepted_alone():
    """Outputs become prompts, whose pages were computed as drafts and as what was drawn."""
    served, plain_ = engine(), plain(model())
    first = run(served, given()[:4], GREEDY)
    longer = [
        [*prompt, *tokens(deltas)] for prompt, deltas in zip(given(), first.values(), strict=False)
    ]
    longer = [prompt for prompt in longer if len(prompt) < 34]
    short = dataclasses.replace(GREEDY, max_tokens=6)
    found = run(served, longer, short)
    assert outputs(found) == outputs(run(plain_, longer, short))
    assert all(
        d[0].cached_tokens >= len(p) // 4 * 4 - 4
        for p, d in zip(longer, found.values(), strict=True)
    )
    assert served.stats().accepted_tokens > 0


def test_what_repeats_takes_few_steps_and_rows_are_counted():
    prompt, long = [7, 8, 9] * 4, dataclasses.replace(GREEDY, max_tokens=24)
    repeats = {30 + i: 8.0 for i in range(2)}  # a model of two tokens comes to repeat itself
    served = engine(fkv.NGramSpeculation(draft_tokens=4), enable_prefix_caching=False)
    found = tokens(run(served, [prompt], dataclasses.replace(long, logit_bias=repeats))["0"])
    stats = served.stats()
    assert len(found) == 24 and stats.steps < 16
    assert stats.generated_tokens == 24 == stats.steps + stats.accepted_tokens
    assert stats.upper_rows == stats.steps + stats.draft_tokens
    assert stats.lower_rows == len(prompt) - 1 + stats.upper_rows


@pytest.mark.parametrize("speculation", [NGRAM, pytest.param(SELF, marks=pytest.mark.slow)])
def test_nothing_compiles_after_warm_up(speculation):
    shapes = StepShapes((3,), (0, 3), (4,), 8)
    sizes = dict(max_num_seqs=3, max_num_batched_tokens=16, num_pages=20)
    served = engine(speculation, tokenizer=Json(), shapes=shapes, **sizes)
    assert served.warm_up() == 4
    with counted_compilations() as seconds:
        for number, prompt in enumerate(given()):
            served.add(prompt, params()[number % 11], request_id=str(number))
            served.step()
        while served.unfinished:
            served.step()
    assert len(seconds) == 0 and served.stats().accepted_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("speculation", [NGRAM, SELF])
def test_hundreds_of_mixed_requests_compile_nothing(speculation):
    """Of two tenants, with prefixes in common; some leave, others are swapped out."""
    policy = POLICIES["fcfs"](on_eviction="swap")
    shapes = StepShapes((2, 8), (0, 8), (4, 12), 8)
    served = engine(speculation, tokenizer=Json(), policy=policy, host_pages=200, shapes=shapes)
    served.warm_up()
    rng, chosen, added = np.random.default_rng(1), params(), 0
    with counted_compilations() as seconds:
        while added < 300 or served.unfinished:
            while added < 300 and served.unfinished < 24:
                prompt = rng.integers(0, 60, rng.integers(1, 28)).tolist()
                prompt = [*range(8), *prompt[:18]] if added % 3 else prompt
                own, tenant = chosen[rng.integers(len(chosen))], "ab"[added % 2]
                served.add(prompt, own, request_id=str(added), tenant=tenant)
                added += 1
                if added % 50 == 0:
                    served.abort(served.names[0])
            served.step()
    stats = served.stats()
    assert len(seconds) == stats.pages_used == 0
    assert stats.preemptions > 0 and stats.prefix_hits > 0 and stats.accepted_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec, geometry, speculation",
    [
        ("mha", "mha", dataclasses.replace(SELF, exit_layer=3)),
        ("cla:k=2", "gqa", dataclasses.replace(SELF, exit_layer=2)),
        ("yoco", "gqa", SELF),
        ("resformer", "gqa", NGRAM),
        ("fusedkv", "mla", SELF),
        ("fusedkv", "mla", NGRAM),
    ],
)
def test_every_layout(spec, geometry, speculation):
    model_ = model(spec, geometry)
    served = engine(speculation, model_)
    found = outputs(run(served, given(), GREEDY))
    assert found == outputs(run(plain(model_), given(), GREEDY))
    assert served.stats().accepted_tokens > 0


def test_continuations_are_those_of_the_longest_and_latest_match():
    def by_hand(tokens, lengths, count):
        for n in reversed(lengths):
            for end in range(len(tokens) - 1, n - 1, -1):
                if tokens[end - n : end] == tokens[len(tokens) - n :]:
                    found = list(tokens)
                    while len(found) < len(tokens) + count:  # what is copied may overlap
                        found.append(found[end + len(found) - len(tokens)])
                    return found[len(tokens) :]
        return []

    text = [int(c) for c in "01020310231020310223310201302"]
    for lengths in (range(1, 2), range(2, 4), range(1, 5)):
        known = NGrams(lengths)
        for size, token in enumerate(text, start=1):
            known.extend([token])
            for count in (0, 1, 4, 9):
                assert known.continuation(count) == by_hand(text[:size], lengths, count)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="prompt_lookup_max=1; use at least 2"):
        fkv.NGramSpeculation(prompt_lookup_max=1)
    with pytest.raises(ValueError, match="they lie in slots: memory='slots'; leave speculation"):
        engine(memory="slots", num_pages=None)
    with pytest.raises(ValueError, match="all layers cache something, so there is no default"):
        engine(SELF, model("mha", "mha"))
    with pytest.raises(ValueError, match="speculative_config: use speculation=fkv.NGram"):
        fkv.LLM(model(), speculative_config={"method": "ngram"})
