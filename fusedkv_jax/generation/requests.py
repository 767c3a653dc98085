"""Prompts and parameters become requests; everything is checked before anything runs."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.data.encoding import encode_prompt, output_decoder
from fusedkv_jax.generation.params import SamplingParams

OnError = Literal["raise", "return"]

if TYPE_CHECKING:
    import jax

    Prompt = str | Sequence[int] | np.ndarray | jax.Array  # a text, or token ids
else:
    Prompt = object  # whatever is given is checked here


class PromptError(ValueError):
    """A prompt that cannot be decoded; the message names the prompt and the fix.

    Attributes:
        number: the prompt's place among the prompts, from 0; None if all are concerned.
        reason: what is wrong with it, to be read after the prompt's name.
    """

    def __init__(self, reason: str, number: int | None = None):
        super().__init__(reason if number is None else f"prompt {number} {reason}")
        self.reason, self.number = reason, number


class LogitsError(PromptError):
    """A model whose logits are not finite, so that no token can be chosen."""


def logits_error(number: int, where: str) -> LogitsError:
    """The error of a prompt whose logits are not finite somewhere."""
    return LogitsError(
        f"cannot be continued: the model's logits are not finite {where}; its weights may hold NaN"
        " (a diverged training, a damaged checkpoint), or its dtype overflows",
        number,
    )


@runtime_checkable
class TokenizerLike(Protocol):
    """What `generate` needs of a tokenizer.

    Texts begin with its `bos_id`, if it has one. `decode(ids, skip_special_tokens=False)` is called
    too, where a request asks for that.
    """

    @property
    def eos_id(self) -> int | None: ...
    def encode(self, text: str) -> Sequence[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Codec:
    """How requests' texts become tokens, and tokens text.

    Attributes:
        tokenizer: None where all prompts are token ids.
        eos_id: the end-of-text token; by default the tokenizer's.
        add_special_tokens: texts begin with the tokenizer's BOS token.
    """

    tokenizer: TokenizerLike | None = None
    eos_id: int | None = None
    add_special_tokens: bool = True

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        if tokenizer is None:
            return
        if not isinstance(tokenizer, TokenizerLike):
            raise PromptError(
                f"tokenizer={tokenizer!r} has no encode, decode and eos_id; pass one, such as"
                " fusedkv_jax.data.tokenizers.load('byte')"
            )
        if self.eos_id is None:
            object.__setattr__(self, "eos_id", tokenizer.eos_id)

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, as documents begin in training."""
        assert self.tokenizer is not None
        return encode_prompt(self.tokenizer, text, add_special_tokens=self.add_special_tokens)

    def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Tokens of each word, as it is written and after a space.

        This excludes more than vLLM does, which leaves a word after a space alone where that has
        another number of tokens than the word at the beginning of a text.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            return ()
        spelled = [text for word in words for text in (word, f" {word.lstrip()}")]
        return tuple(dict.fromkeys(tuple(tokenizer.encode(text)) for text in spelled))

    def decoder(self, skip_special_tokens: bool) -> Callable[[Sequence[int]], str] | None:
        """Text of tokens, with or without special tokens; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return output_decoder(self.tokenizer, skip_special_tokens=skip_special_tokens)


@dataclass(frozen=True)
class PreparedRequest:
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
    prompts: object,
    params: SamplingParams | Sequence[SamplingParams] | None,
    codec: Codec,
    on_error: OnError = "raise",
) -> tuple[list[PreparedRequest], dict[int, PromptError]]:
    """Requests, and the errors of those prompts that cannot be decoded.

    Raises:
        PromptError: what concerns all prompts; with `on_error="raise"`, the first error.
    """
    if on_error not in ("raise", "return"):
        raise PromptError(f"on_error={on_error!r}; use 'raise' or 'return'")
    prompts = _check_prompts(prompts)
    chosen = _check_params(params, len(prompts))
    requests, errors = [], {}
    for number, (prompt, own) in enumerate(zip(prompts, chosen, strict=True)):
        try:
            requests.append(_request(config, number, prompt, own, codec))
        except PromptError as error:
            if on_error == "raise":
                raise
            errors[number] = error
    return requests, errors


def _check_prompts(prompts: object) -> list[object]:
    if isinstance(prompts, str | bytes):
        raise PromptError(f"prompts is one {type(prompts).__name__}; pass a list of prompts")
    if isinstance(prompts, Mapping | set) or not isinstance(prompts, Iterable):
        raise PromptError(f"prompts={prompts!r}; pass a list of texts, or of lists of token ids")
    prompts = list(prompts)
    if prompts and all(_is_token(prompt) for prompt in prompts):
        raise PromptError("prompts is one list of token ids; pass a list of prompts, [[1, 2, 3]]")
    return prompts


def _is_token(value: object) -> bool:
    return isinstance(value, numbers.Integral) or getattr(value, "shape", None) == ()


def _check_params(params: object, count: int) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or isinstance(params, str):
        raise PromptError(f"params={params!r}; pass SamplingParams(...), or a list of them")
    wrong = next((p for p in params if not isinstance(p, SamplingParams)), None)
    if wrong is not None:
        raise PromptError(f"params holds {wrong!r}; pass a list of SamplingParams(...)")
    if len(params) != count:
        raise PromptError(f"{len(params)} sampling parameters for {count} prompts")
    return params


def _request(
    config: ModelConfig, number: int, prompt: object, params: SamplingParams, codec: Codec
) -> PreparedRequest:
    ids = _tokens(number, prompt, codec)
    if not ids:
        raise PromptError("is empty; give it at least one token", number)
    if len(ids) >= config.max_length:
        raise PromptError(
            f"has {len(ids)} tokens, the model's context of {config.max_length} leaves no room for"
            " output; shorten it or raise max_length",
            number,
        )
    biased = [token for token, _ in params.logit_bias]
    for name, tokens in (
        ("has", ids),
        ("has in stop_token_ids", params.stop_token_ids),
        ("has in logit_bias", biased),
    ):
        _check_ids(config, number, name, tokens)
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name)
        if count is not None and count > config.vocab_size:
            raise PromptError(
                f"has {name}={count}; the vocabulary has {config.vocab_size}, use -1 for all of it",
                number,
            )
    for name in ("stop", "bad_words"):
        texts = getattr(params, name)
        if texts and codec.tokenizer is None:
            raise PromptError(f"has {name}={texts!r}; pass tokenizer= for that", number)
    if params.structured_outputs is not None:  # the engine looks at it before
        raise PromptError("has structured_outputs; fkv.LLM serves them, or an engine", number)
    stops = tuple(params.stop_token_ids)
    if codec.eos_id is not None and not params.ignore_eos:
        stops = (*stops, codec.eos_id)
    limit = config.max_length
    if params.max_tokens is not None:
        limit = min(len(ids) + params.max_tokens, limit)
    words = codec.bad_words(params.bad_words)
    return PreparedRequest(number, ids, params, limit, stops, codec.eos_id, words)


def _tokens(number: int, prompt: Any, codec: Codec) -> tuple[int, ...]:
    if isinstance(prompt, bytes):
        raise PromptError("is bytes; decode it to text, or pass token ids", number)
    if isinstance(prompt, str):
        if codec.tokenizer is None:
            raise PromptError("is text; pass tokenizer= or token ids", number)
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"is not Unicode text: {error.reason} at character {error.start};"
                " decode its bytes as UTF-8 with errors='replace'",
                number,
            ) from None
        prompt = codec.encode(prompt)
    if hasattr(prompt, "dtype"):
        prompt = np.asarray(prompt)
        if prompt.ndim != 1:
            shape = prompt.shape
            raise PromptError(f"is an array of shape {shape}; pass one row of token ids", number)
        prompt = prompt.tolist()
    try:
        if any(isinstance(token, bool | np.bool_) for token in prompt):
            raise TypeError("a bool is no token")
        return tuple(operator.index(token) for token in prompt)
    except TypeError:
        raise PromptError("is neither a text nor a list of token ids", number) from None


def _check_ids(config: ModelConfig, number: int, where: str, ids: Sequence[int]) -> None:
    wrong = next((t for t in ids if not 0 <= t < config.vocab_size), None)
    if wrong is not None:
        raise PromptError(
            f"{where} token id {wrong}; ids are 0 to {config.vocab_size - 1} (is it the"
            " tokenizer that the model was trained with?)",
            number,
        )
