"""`generate`: prompts in, completions out, in the order of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusedkv_jax.cache import KVCache
from fusedkv_jax.generation import loop
from fusedkv_jax.generation.sampling import SamplerInputs, SamplingParams
from fusedkv_jax.model import Decoder, fold_fusion

SHORTEST_BUCKET = 16
_STOPS_BUCKET = 4


class PromptError(ValueError):
    """A prompt that cannot be decoded; the message names the prompt and the fix."""


@runtime_checkable
@runtime_checkable
class Tokenizer(Protocol):
    """What `generate` needs of a tokenizer."""

    @property
    def eos_id(self) -> int | None: ...
    def encode(self, text: str) -> Sequence[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with.

    Attributes:
        prompt_token_ids: the prompt.
        token_ids: the output; a stop token is its last element.
        text: the decoded output without the stop token, if there is a tokenizer.
        finish_reason: `stop` (a stop token) or `length`.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: Literal["stop", "length"]


def generate(
    model: Decoder,
    prompts: Sequence[Any],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    eos_id: int | None = None,
    batch_size: int = 32,
    cache_dtype: str | None = None,
    bucketing: bool = True,
) -> list[Completion]:
    """Continue prompts.

    Args:
        model: the model.
        prompts: texts (with `tokenizer`), or lists or arrays of token ids.
        params: sampling parameters, one for all prompts or one for each.
        tokenizer: encodes prompts, decodes outputs and names the end-of-text token.
        eos_id: end-of-text token where there is no tokenizer.
        batch_size: prompts decoded together at most.
        cache_dtype: storage type of the cache, by default the model's activation type.
        bucketing: round batch, prompt and cache lengths up to powers of two, so that new lengths
            rarely compile. Outputs do not depend on it.

    Returns:
        One completion per prompt, in order. Where prompt and `max_tokens` exceed the model's
        `max_length`, the output is cut there.

    Raises:
        PromptError: an empty prompt, one that fills the model's context, or a token id outside
            the vocabulary.
    """
    model = fold_fusion(model)
    requests = _requests(model, prompts, params, tokenizer, eos_id)
    # Neighbors in length share a batch, which saves padding; results return to their places.
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
    split = nnx.split(model)
    completions: dict[int, Completion] = {}
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        batch = [requests[i] for i in places]
        outputs = _decode_batch(model, split, batch, cache_dtype, bucketing)
        for place, request, output in zip(places, batch, outputs, strict=True):
            completions[place] = _completion(request, output, tokenizer)
    return [completions[i] for i in range(len(requests))]


def warm_up(
    model: Decoder, *, batch_size: int, max_length: int, cache_dtype: str | None = None
) -> int:
    """Compile every bucket that prompts and outputs of up to `max_length` tokens can need.

    Args:
        model: the model.
        batch_size: batches of 1, 2, 4, ... up to this many rows are compiled.
        max_length: longest prompt and output together, in tokens.
        cache_dtype: storage type of the cache, as for `generate`.

    Returns:
        The number of buckets.
    """
    model = fold_fusion(model)
    split = nnx.split(model)
    shapes = [
        (rows, prompt, total)
        for rows in _powers(1, batch_size)
        for total in _powers(SHORTEST_BUCKET, min(max_length, model.config.max_length))
        for prompt in _powers(SHORTEST_BUCKET, total)
    ]
    for rows, prompt, total in shapes:
        batch = _Batch.empty(rows, prompt, total, _STOPS_BUCKET)
        batch.lengths[:], batch.limits[:] = 1, 3
        _run(model, split, batch, [SamplingParams(temperature=0.0)] * rows, cache_dtype)
    return len(shapes)


@dataclass(frozen=True)
class _Request:
    prompt: tuple[int, ...]
    params: SamplingParams
    limit: int
    stops: tuple[int, ...]


def _requests(model, prompts, params, tokenizer, eos_id) -> list[_Request]:
    if isinstance(prompts, str):
        raise PromptError("prompts is one string; pass a list of prompts")
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise PromptError(f"{len(params)} sampling parameters for {len(prompts)} prompts")
    eos_id = tokenizer.eos_id if tokenizer is not None and eos_id is None else eos_id
    requests = []
    for i, (prompt, chosen) in enumerate(zip(prompts, params, strict=True)):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise PromptError(f"prompt {i} is text; pass tokenizer= or token ids")
            prompt = tokenizer.encode(prompt)
        ids = tuple(int(token) for token in prompt)
        _check_prompt(model, i, ids)
        stops = chosen.stop_token_ids
        if eos_id is not None and not chosen.ignore_eos:
            stops = (*stops, eos_id)
        limit = min(len(ids) + chosen.max_tokens, model.config.max_length)
        requests.append(_Request(ids, chosen, limit, stops))
    return requests


def _check_prompt(model: Decoder, i: int, ids: tuple[int, ...]) -> None:
    config = model.config
    if not ids:
        raise PromptError(f"prompt {i} is empty; give it at least one token")
    if len(ids) >= config.max_length:
        raise PromptError(
            f"prompt {i} has {len(ids)} tokens, the model's context of {config.max_length} leaves"
            " no room for output; shorten it or raise max_length"
        )
    wrong = next((t for t in ids if not 0 <= t < config.vocab_size), None)
    if wrong is not None:
        raise PromptError(
            f"prompt {i} has token id {wrong}; ids are 0 to {config.vocab_size - 1} (is it the"
            " tokenizer that the model was trained with?)"
        )


@dataclass(frozen=True)
class _Batch:
    """The arrays of one batch: rows, and what `loop.start` takes of them."""

    prompt: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    limits: np.ndarray
    stops: np.ndarray

    @classmethod
    def empty(cls, rows: int, prompt: int, total: int, stops: int) -> _Batch:
        def zeros(*shape):
            return np.zeros(shape, np.int32)

        none = np.full((rows, stops), -1, np.int32)
        return cls(zeros(rows, prompt), zeros(rows, total), zeros(rows), zeros(rows), none)


def _decode_batch(
    model: Decoder,
    split: tuple,
    requests: Sequence[_Request],
    cache_dtype: str | None,
    bucketing: bool,
) -> list[tuple[int, ...]]:
    """Outputs of requests that are decoded together."""
    rows = len(requests)
    longest = max(len(request.prompt) for request in requests)
    total = max(request.limit for request in requests)
    stops = max(1, *(len(request.stops) for request in requests))
    if bucketing:
        rows, longest, total = _power(rows, 1), _power(longest), _power(total)
        stops = _power(stops, _STOPS_BUCKET)
    batch = _Batch.empty(rows, longest, total, stops)
    for row, request in enumerate(requests):
        size = len(request.prompt)
        batch.prompt[row, :size] = batch.tokens[row, :size] = request.prompt
        batch.lengths[row], batch.limits[row] = size, request.limit
        batch.stops[row, : len(request.stops)] = request.stops
    padding = [SamplingParams(temperature=0.0)] * (rows - len(requests))
    params = [*(request.params for request in requests), *padding]
    ends, tokens = _run(model, split, batch, params, cache_dtype)
    return [
        tuple(tokens[row, len(request.prompt) : ends[row]].tolist())
        for row, request in enumerate(requests)
    ]


def _run(
    model: Decoder,
    split: tuple,
    batch: _Batch,
    params: Sequence[SamplingParams],
    cache_dtype: str | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Final lengths and token buffer of a batch."""
    rows, total = batch.tokens.shape
    inputs = SamplerInputs.create(params)
    cache = KVCache.create(model.config, batch_size=rows, max_length=total, dtype=cache_dtype)
    arrays = (batch.prompt, batch.tokens, batch.lengths, batch.limits, batch.stops)
    state = loop.start(*split, *map(jnp.asarray, arrays), cache, inputs)
    state = loop.decode(*split, state, inputs)
    return np.asarray(state.lengths), np.asarray(state.tokens)


def _completion(
    request: _Request, output: tuple[int, ...], tokenizer: Tokenizer | None
) -> Completion:
    stopped = output[-1] in request.stops
    text = None
    if tokenizer is not None:
        text = tokenizer.decode(output[:-1] if stopped else output)
    return Completion(request.prompt, output, text, "stop" if stopped else "length")


def _power(size: int, least: int = SHORTEST_BUCKET) -> int:
    return max(least, 1 << (size - 1).bit_length())


def _powers(least: int, most: int) -> list[int]:
    """Powers of two from `least` up to the first that holds `most`."""
    powers = [least]
    while powers[-1] < most:
        powers.append(powers[-1] * 2)
    return powers
