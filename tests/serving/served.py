"""Engines of small models for the tests, which share their compiled programs."""

import functools
import string

import numpy as np

import fusedkv_jax as fkv
from fusedkv_jax.serving import Engine, OutputDelta, ServingSettings, StepShapes
from tests.model import small

LONGEST, PAGE, PAGES = 40, 4, 60
SHAPES = StepShapes(decode_rows=(8,), mixed_rows=(0, 8), chunk_rows=(12,), chunk=8)
GREEDY = fkv.SamplingParams(temperature=0.0, max_tokens=12)


class Letters:
    """A tokenizer: every token is a character."""

    eos_id = None
    _letters = string.ascii_letters + string.digits[:8] + " "

    def encode(self, text):
        return [self._letters.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(self._letters[i % len(self._letters)] for i in ids)


class Json(Letters):
    """Every token is a character of JSON, and tells its bytes; the last one ends the text."""

    vocab_size, eos_id = 61, 60
    _letters = '{}[]":,.-+ \n' + string.digits + string.ascii_lowercase + "ABCDEFGHIJKL"

    def decode_bytes(self, ids):
        return "".join(self._letters[i] for i in ids if i < 60).encode()

    def decode(self, ids, skip_special_tokens=True):
        return self.decode_bytes(ids).decode()


@functools.cache
def model(spec="fusedkv", geometry="gqa"):
    return small.decoder(small.config(spec, geometry, num_layers=4, d_model=16, d_ff=16))


def engine(model_=None, tokenizer=None, **changes):
    settings = dict(
        max_num_seqs=8,
        max_num_batched_tokens=48,
        max_model_len=LONGEST,
        page_size=PAGE,
        num_pages=PAGES,
        shapes=SHAPES,
    )
    return Engine(model_ or model(), tokenizer, ServingSettings(**{**settings, **changes}))


def prompts(count, seed=0, longest=LONGEST - 12):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 60, rng.integers(1, longest)).tolist() for _ in range(count)]


def odd_params():
    """Requests that use whatever the sampler has."""
    common = dict(temperature=1.0, max_tokens=10)
    return [
        fkv.SamplingParams(seed=1, **common),
        fkv.SamplingParams(seed=2, top_k=5, top_p=0.9, logprobs=3, **common),
        fkv.SamplingParams(seed=3, repetition_penalty=1.5, presence_penalty=0.5, **common),
        fkv.SamplingParams(seed=4, logit_bias={7: 6.0, 8: -100.0}, min_p=0.1, **common),
        fkv.SamplingParams(seed=5, stop_token_ids=[*range(15)], min_tokens=4, **common),
        fkv.SamplingParams(seed=6, bad_words=["ab", "c"], frequency_penalty=1.0, **common),
    ]


def run(served, given, params) -> dict[str, list[OutputDelta]]:
    """All deltas of some prompts that are added together, by their numbers."""
    if isinstance(params, fkv.SamplingParams):
        params = [params] * len(given)
    found = {str(i): [] for i in range(len(given))}
    for i, (prompt, own) in enumerate(zip(given, params, strict=True)):
        served.add(prompt, own, request_id=str(i))
    for _ in range(20_000):
        if not served.unfinished:
            break
        for name, delta in served.step():
            found[name].append(delta)
    assert not served.unfinished
    assert served.stats().pages_used == 0
    return found


def tokens(deltas, index=0):
    return tuple(t for d in deltas if d.index == index for t in d.token_ids)


def all_tokens(found):
    return [tokens(deltas) for deltas in found.values()]
