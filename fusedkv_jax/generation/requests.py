"""Prompts and parameters become requests; everything is checked before anything runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.generation.params import SamplingParams

OnError = Literal["raise", "return"]


class PromptError(ValueError):
    """A prompt that cannot be decoded; the message names the prompt and the fix."""


@runtime_checkable
class Tokenizer(Protocol):
    """What `generate` needs of a tokenizer.

    `decode(ids, skip_special_tokens=False)` is called too, where a request asks for that.
    """

    @property
    def eos_id(self) -> int | None: ...
    def encode(self, text: str) -> Sequence[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Request:
    """A prompt that can be decoded.

    Attributes:
        number: its place among the prompts.
        prompt: its tokens.
        params: how it is decoded.
        limit: tokens at which an output ends, prompt included.
        stops: tokens that end an output, the end-of-text token included.
        eos_id: the end-of-text token.
        bad_words: tokens of its bad words.
    """

    number: int
    prompt: tuple[int, ...]
    params: SamplingParams
    limit: int
    stops: tuple[int, ...]
    eos_id: int | None
    bad_words: tuple[tuple[int, ...], ...]


def make_requests(
    config: ModelConfig,
    prompts: Sequence[Any],
    params: SamplingParams | Sequence[SamplingParams] | None,
    tokenizer: Tokenizer | None,
    eos_id: int | None,
    on_error: OnError = "raise",
) -> tuple[list[Request], dict[int, PromptError]]:
    """Requests, and the errors of those prompts that cannot be decoded.

    Raises:
        PromptError: what concerns all prompts; with `on_error="raise"`, the first error.
    """
    if isinstance(prompts, str | bytes):
        raise PromptError(f"prompts is one {type(prompts).__name__}; pass a list of prompts")
    if on_error not in ("raise", "return"):
        raise PromptError(f"on_error={on_error!r}; use 'raise' or 'return'")
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise PromptError(f"{len(params)} sampling parameters for {len(prompts)} prompts")
    eos_id = tokenizer.eos_id if tokenizer is not None and eos_id is None else eos_id
    requests, errors = [], {}
    for number, (prompt, chosen) in enumerate(zip(prompts, params, strict=True)):
        try:
            requests.append(_request(config, number, prompt, chosen, tokenizer, eos_id))
        except PromptError as error:
            if on_error == "raise":
                raise
            errors[number] = error
    return requests, errors


def prompt_tokens(
    config: ModelConfig, number: int, prompt: Any, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """Checked tokens of a prompt, which is a text or token ids.

    Raises:
        PromptError: it is empty, not text, too long, or has unknown tokens.
    """
    ids = _tokens(number, prompt, tokenizer)
    if not ids:
        raise PromptError(f"prompt {number} is empty; give it at least one token")
    if len(ids) >= config.max_length:
        raise PromptError(
            f"prompt {number} has {len(ids)} tokens, the model's context of {config.max_length}"
            " leaves no room for output; shorten it or raise max_length"
        )
    _check_ids(config, f"prompt {number} has", ids)
    return ids


def _tokens(number: int, prompt: Any, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if isinstance(prompt, bytes):
        raise PromptError(f"prompt {number} is bytes; decode it to text, or pass token ids")
    if isinstance(prompt, str):
        if tokenizer is None:
            raise PromptError(f"prompt {number} is text; pass tokenizer= or token ids")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"prompt {number} is not Unicode text: {error.reason} at character {error.start};"
                " decode its bytes as UTF-8 with errors='replace'"
            ) from None
        prompt = tokenizer.encode(prompt)
    if hasattr(prompt, "dtype"):
        prompt = np.asarray(prompt).ravel().tolist()
    try:
        return tuple(operator.index(token) for token in prompt)
    except TypeError:
        raise PromptError(f"prompt {number} is neither a text nor a list of token ids") from None


def _request(config, number, prompt, params, tokenizer, eos_id) -> Request:
    ids = prompt_tokens(config, number, prompt, tokenizer)
    for name in ("stop", "bad_words"):
        texts = getattr(params, name)
        if texts and tokenizer is None:
            raise PromptError(f"prompt {number} has {name}={texts!r}; pass tokenizer= for that")
    biased = [token for token, _ in params.logit_bias]
    for name, tokens in (("stop_token_ids", params.stop_token_ids), ("logit_bias", biased)):
        _check_ids(config, f"prompt {number} has in {name}", tokens)
    stops = tuple(params.stop_token_ids)
    if eos_id is not None and not params.ignore_eos:
        stops = (*stops, eos_id)
    limit = config.max_length
    if params.max_tokens is not None:
        limit = min(len(ids) + params.max_tokens, limit)
    words = _bad_words(params.bad_words, tokenizer)
    return Request(number, ids, params, limit, stops, eos_id, words)


def _check_ids(config: ModelConfig, where: str, ids: Sequence[int]) -> None:
    wrong = next((t for t in ids if not 0 <= t < config.vocab_size), None)
    if wrong is not None:
        raise PromptError(
            f"{where} token id {wrong}; ids are 0 to {config.vocab_size - 1} (is it the"
            " tokenizer that the model was trained with?)"
        )


def _bad_words(words: Sequence[str], tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], ...]:
    """Tokens of each word, at the beginning of a text and after a space, as vLLM excludes them."""
    if tokenizer is None:
        return ()
    spelled = [text for word in words for text in (word, f" {word.lstrip()}")]
    return tuple(dict.fromkeys(tuple(tokenizer.encode(text)) for text in spelled))


def decoder(tokenizer: Any, skip_special_tokens: bool) -> Callable[[Sequence[int]], str] | None:
    """The tokenizer's `decode`, with or without special tokens; None without a tokenizer."""
    if tokenizer is None or skip_special_tokens:
        return None if tokenizer is None else tokenizer.decode
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
