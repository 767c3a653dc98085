"""What a request may ask for: several outputs, log-probabilities, stops, biases, streaming."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.data.tokenizers import ByteTokenizer
from fusedkv_jax.generation import programs
from tests.model import small

TOKENIZER = ByteTokenizer()
TEXTS = ["größe(", "x", "日本 🙂"]


def greedy(**changes):
    return fkv.SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **changes})


def drawn(**changes):
    return fkv.SamplingParams(**{"seed": 5, "max_tokens": 12, **changes})


@pytest.fixture(scope="module")
def model():
    """Of bytes; the special tokens are unlikely, which keeps outputs long."""
    return small.decoder(small.config("fusedkv", vocab_size=258, num_layers=4, d_model=16))


@pytest.fixture(scope="module")
def letters(model):
    """The same, but its outputs are letters and parts of characters."""
    pieces = [*b"abc", *"é🙂日".encode()]
    return tuple((token, 40.0) for token in pieces)


def continued(model, prompts, params, **options):
    return fkv.generate(model, prompts, params, tokenizer=TOKENIZER, **options)


def joined(deltas):
    """{(prompt, output): (text, tokens, reasons, logprobs)} of a stream."""
    found = {}
    for delta in deltas:
        text, tokens, _, logprobs = found.get((delta.prompt, delta.index), ("", (), None, []))
        reasons = (delta.finish_reason, delta.stop_reason)
        found[delta.prompt, delta.index] = (
            text + delta.text,
            tokens + delta.token_ids,
            reasons,
            logprobs + (delta.logprobs or []),
        )
    return found


def test_n_outputs_are_those_of_n_requests(model):
    params = [drawn(n=3), drawn(n=1, seed=9), drawn(n=2)]
    together = continued(model, TEXTS, params)
    assert [len(c.outputs) for c in together] == [3, 1, 2]
    for text, chosen, completion in zip(TEXTS, params, together, strict=True):
        for output in completion.outputs:
            alone = dataclasses.replace(chosen, n=1, seed=chosen.seed + output.index)
            (expected,) = continued(model, [text], alone)
            assert output.token_ids == expected.token_ids and output.text == expected.text
    assert len({output.token_ids for output in together[0].outputs}) == 3
    # As few rows together as may be: the same.
    assert continued(model, TEXTS, params, batch_size=1) == together


def test_logprobs_are_those_of_the_full_forward(model):
    params = drawn(
        logprobs=3, prompt_logprobs=2, logit_bias={7: 5.0}, repetition_penalty=1.5, temperature=0.7
    )
    plain = dataclasses.replace(params, prompt_logprobs=None)
    scored, neighbor = continued(model, [TEXTS[2], TEXTS[2]], [params, plain])
    assert neighbor.token_ids == scored.token_ids and neighbor.prompt_logprobs is None
    tokens = (*scored.prompt_token_ids, *scored.token_ids)
    row = np.asarray(model(jnp.asarray([tokens + (0,) * (32 - len(tokens))]))[0], np.float64)
    row -= np.log(np.exp(row).sum(-1, keepdims=True))
    assert scored.prompt_logprobs is not None and scored.logprobs is not None
    assert scored.prompt_logprobs[0] is None
    places = [*scored.prompt_logprobs[1:], *scored.logprobs]
    counts = [2] * (len(scored.prompt_token_ids) - 1) + [3] * len(scored.token_ids)
    for place, (entries, count) in enumerate(zip(places, counts, strict=True)):
        order = np.argsort(-row[place])
        assert set(entries) == {*order[:count].tolist(), tokens[place + 1]}
        for token, entry in entries.items():
            assert entry.logprob == pytest.approx(row[place, token], abs=1e-4)
            assert entry.rank == 1 + int((row[place] > row[place, token]).sum())
            assert entry.decoded_token == TOKENIZER.decode([token])
    chosen = [row[len(scored.prompt_token_ids) - 1 + i, t] for i, t in enumerate(scored.token_ids)]
    assert scored.outputs[0].cumulative_logprob == pytest.approx(sum(chosen), abs=1e-3)


def test_tokens_that_the_tokenizer_has_not_are_no_text():
    """Models are padded to more rows than their tokenizer has ids, and may write them."""
    model = small.decoder(small.config("mha", vocab_size=300, num_layers=2, d_model=16))
    bias = tuple((token, 60.0) for token in (*b"ab", 258, 299))
    params = drawn(max_tokens=24, logit_bias=bias, logprobs=4)
    for chosen in (params, dataclasses.replace(params, stop="bb", skip_special_tokens=False)):
        (found,) = continued(model, ["x"], chosen)
        known = [token for token in found.token_ids if token < 258]
        assert 0 < len(known) < len(found.token_ids)
        text = TOKENIZER.decode(known)
        assert found.text == (text.removesuffix("bb") if found.stop_reason else text)
        streamed = joined(fkv.stream(model, ["x"], chosen, tokenizer=TOKENIZER))
        assert streamed[0, 0][:2] == (found.text, found.token_ids)
        for place in found.outputs[0].logprobs:
            assert all((entry.decoded_token == "") == (t > 257) for t, entry in place.items())
    (scored,) = continued(model, [[97, 299]], greedy(prompt_logprobs=0, max_tokens=1))
    assert scored.prompt_logprobs[1][299].decoded_token == ""
    asked = fkv.BeamSearchParams(beam_width=2, max_tokens=12)
    (beams,) = fkv.beam_search(model, ["x"], asked, tokenizer=TOKENIZER)
    assert any(token > 257 for output in beams.outputs for token in output.token_ids)
    for output in beams.outputs:
        assert output.text == TOKENIZER.decode([t for t in output.token_ids if t < 258])


def test_prompt_logprobs_in_chunks_and_of_the_whole_vocabulary(model):
    params = greedy(prompt_logprobs=-1, max_tokens=1)
    whole = continued(model, TEXTS, params)
    chunked = continued(model, TEXTS, params, max_num_batched_tokens=12)
    for one, other in zip(whole, chunked, strict=True):
        assert one.outputs == other.outputs
        for place, expected in zip(other.prompt_logprobs[1:], one.prompt_logprobs[1:], strict=True):
            assert len(place) == 258
            assert sum(np.exp(entry.logprob) for entry in place.values()) == pytest.approx(1)
            for token, entry in place.items():
                assert entry.logprob == pytest.approx(expected[token].logprob, abs=1e-4)


def test_stop_texts_end_the_output_exactly(model, letters):
    params = drawn(max_tokens=40, logit_bias=dict(letters), ignore_eos=True)
    (whole,) = continued(model, TEXTS[:1], params)
    checked = 0
    for size in (1, 2, 3):
        for start in range(1, len(whole.text) - size, 5):
            stop = whole.text[start : start + size]
            if "\ufffd" in stop:  # half a character: its text is not settled yet
                continue
            checked += 1
            end = whole.text.index(stop)
            for include in (False, True):
                chosen = dataclasses.replace(
                    params, stop=(stop, "never"), include_stop_str_in_output=include
                )
                (found,) = continued(model, TEXTS[:1], chosen)
                assert found.text == whole.text[: end + size * include]
                assert (found.finish_reason, found.stop_reason) == ("stop", stop)
                # The last token is the one that completes the stop text.
                kept = len(found.token_ids)
                assert found.token_ids == whole.token_ids[:kept]
                assert stop in TOKENIZER.decode(found.token_ids)
                assert stop not in TOKENIZER.decode(found.token_ids[:-1])
                streamed = joined(fkv.stream(model, TEXTS[:1], chosen, tokenizer=TOKENIZER))
                assert streamed[0, 0][:3] == (found.text, found.token_ids, ("stop", stop))
    assert checked > 3


def test_streams_join_to_the_whole(model, letters):
    params = [
        drawn(n=2, logit_bias=dict(letters), max_tokens=30, logprobs=1),
        greedy(),
        drawn(max_tokens=20, logit_bias=dict(letters), stop_token_ids=(ord("b"),)),
    ]
    whole = continued(model, TEXTS, params)
    for interval in (1, 3, 64):
        deltas = list(
            fkv.stream(model, TEXTS, params, tokenizer=TOKENIZER, stream_interval=interval)
        )
        assert all(1 <= len(delta.token_ids) <= interval for delta in deltas)
        found = joined(deltas)
        for number, completion in enumerate(whole):
            for output in completion.outputs:
                reasons = output.finish_reason, output.stop_reason
                expected = (output.text, output.token_ids, reasons, output.logprobs or [])
                assert found[number, output.index] == expected
        assert {len(delta.token_ids) for delta in deltas[:4]} == {1}  # the first tokens at once


def test_min_tokens_and_stop_tokens(model):
    (whole,) = continued(model, TEXTS[:1], greedy())
    stop = whole.token_ids[2]
    (early,) = continued(model, TEXTS[:1], greedy(stop_token_ids=(stop,)))
    end = whole.token_ids.index(stop) + 1
    assert early.token_ids == whole.token_ids[:end] and early.stop_reason == stop
    assert early.text == TOKENIZER.decode(whole.token_ids[: end - 1])
    kept = greedy(stop_token_ids=(stop,), include_stop_str_in_output=True)
    assert continued(model, TEXTS[:1], kept)[0].text == TOKENIZER.decode(early.token_ids)
    (late,) = continued(model, TEXTS[:1], greedy(stop_token_ids=(stop,), min_tokens=6))
    assert stop not in late.token_ids[:6] and len(late.token_ids) > 6
    first = TOKENIZER.decode(whole.token_ids[:1])
    if first.isprintable() and "\ufffd" not in first:
        (text,) = continued(model, TEXTS[:1], greedy(stop=first, min_tokens=1))
        assert len(text.token_ids) > 1
    (eos,) = continued(model, TEXTS[:1], greedy(logit_bias={257: 100}))
    assert (eos.token_ids, eos.text, eos.stop_reason) == ((257,), "", None)


def test_an_unfinished_character_is_no_stop_text_before_min_tokens(model):
    broken = dict(logit_bias={0xF0: 100}, max_tokens=4, stop="\ufffd")
    (whole,) = continued(model, TEXTS[:1], greedy(min_tokens=4, **broken))
    assert (whole.finish_reason, whole.text) == ("length", "\ufffd" * 4)
    (ended,) = continued(model, TEXTS[:1], greedy(min_tokens=3, **broken))
    assert (ended.finish_reason, ended.stop_reason, ended.text) == ("stop", "\ufffd", "")


def test_logit_bias_and_bad_words(model):
    wanted = greedy(logit_bias={65: 100})
    (forced,) = continued(model, TEXTS[:1], wanted)
    assert forced.text == "A" * 12
    (without,) = continued(model, TEXTS[:1], greedy(logit_bias={65: 100, 66: 60}, bad_words=("A",)))
    assert without.text == "B" * 12
    # A word of several tokens: its parts alone may come.
    (pairs,) = continued(
        model, TEXTS[:1], greedy(logit_bias={65: 100, 66: 60}, bad_words=("AA", "BBA"))
    )
    assert pairs.text == "ABABABABABAB"
    many = {token: -100.0 for token in range(100)}
    (high,) = continued(model, TEXTS[:1], greedy(logit_bias=many))
    assert min(high.token_ids) >= 100


def test_a_shared_prefix_is_prefilled_once_and_changes_nothing(model, monkeypatch):
    counted = []
    original = programs.run_chunks

    def run_chunks(split, prompts, cache, plan):
        counted.append(int(prompts.lengths.sum()))
        return original(split, prompts, cache, plan)

    monkeypatch.setattr(programs, "run_chunks", run_chunks)
    prefix = list(range(20))
    prompts = [[*prefix, *tail] for tail in ([1, 2, 3], [4], [1, 9], [7] * 11)]
    shared = fkv.generate(model, prompts, greedy(), batch_size=2)
    assert counted == [20, 1 + 2, 3 + 11]
    counted.clear()
    apart = fkv.generate(model, prompts, greedy(), batch_size=2, enable_prefix_caching=False)
    assert sum(counted) == 4 * 20 + 17
    assert [c.token_ids for c in shared] == [c.token_ids for c in apart]
    # Equal prompts keep a token each, whose logits are wanted.
    counted.clear()
    equal = fkv.generate(model, [prompts[0]] * 3, greedy())
    assert counted == [22, 3]
    assert {c.token_ids for c in equal} == {shared[0].token_ids}


def test_progress_and_rates(model):
    seen = []
    completions = continued(
        model,
        TEXTS,
        [greedy(max_tokens=33, ignore_eos=True), drawn(n=2), greedy(max_tokens=1)],
        progress=lambda rates: seen.append(dataclasses.replace(rates)),
    )
    last = seen[-1]
    assert len(seen) > 3 and last.requests == 3
    assert last.prompt_tokens == sum(1 + len(text.encode()) for text in TEXTS)  # BOS too
    outputs = [output for completion in completions for output in completion.outputs]
    assert last.output_tokens == sum(len(output.token_ids) for output in outputs)
    assert last.prefill_seconds > 0 and last.decode_seconds > 0
    assert [r.output_tokens for r in seen] == sorted(r.output_tokens for r in seen)
    assert str(last).startswith(f"prefill {last.prompt_tokens} tokens, ")


def test_refused_prompts_leave_the_others_alone(model):
    prompts = [[1, 2], [], [3, 258], b"x", "a\ud800", [1.5], [0] * 64, "fine"]
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        continued(model, prompts, greedy())
    found = continued(model, prompts, greedy(), on_error="return")
    alone = continued(model, [prompts[0], prompts[-1]], greedy())
    assert [found[0], found[-1]] == alone
    messages = [completion.error for completion in found[1:-1]]
    for message, part in zip(
        messages,
        [
            "prompt 1 is empty; give it at least one token",
            "prompt 2 has token id 258; ids are 0 to 257",
            "prompt 3 is bytes; decode it to text",
            "prompt 4 is not Unicode text: surrogates not allowed at character 1",
            "prompt 5 is neither a text nor a list of token ids",
            "prompt 6 has 64 tokens, the model's context of 64 leaves no room",
        ],
        strict=True,
    ):
        assert part in message and "\n" not in message
    assert all(completion.outputs == () for completion in found[1:-1])


@pytest.mark.parametrize(
    "params, message",
    [
        (dict(stop="x"), r"prompt 0 has stop=\('x',\); pass tokenizer="),
        (dict(bad_words=("x",)), "prompt 0 has bad_words="),
        (dict(stop_token_ids=(258,)), "prompt 0 has in stop_token_ids token id 258"),
        (dict(logit_bias={300: 1.0}), "prompt 0 has in logit_bias token id 300"),
    ],
)
def test_parameters_that_the_model_cannot_meet(model, params, message):
    with pytest.raises(ValueError, match=message):
        fkv.generate(model, [[1]], greedy(**params))


def test_stream_checks_at_the_call(model):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        fkv.stream(model, [[]])
    with pytest.raises(ValueError, match="stream_interval=0; use at least 1"):
        fkv.stream(model, [[1]], stream_interval=0)
    with pytest.raises(ValueError, match="batch_size=0; use at least 1"):
        fkv.generate(model, [[1]], batch_size=0)
