"""What a user may ask of a request: vLLM's sampling and beam search parameters, checked at once."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np

from fusedkv_jax.generation.structured import StructuredOutputsParams
from fusedkv_jax.validation import check_kind

_MOST = 2**31 - 1  # what an int32 holds
_MOST_OUTPUTS = 16_384  # vLLM's bound


class SamplingError(ValueError):
    """A sampling parameter out of its bounds; the message names it, its value and the bounds."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded. Names, bounds and meaning are vLLM's.

    Attributes:
        n: outputs to draw; they share one prefill, and output i is drawn with `seed + i`.
        temperature: 0 is greedy (so is anything below 1e-5); higher is more random.
        top_k: draw from the k likeliest tokens; 0 or -1 for all.
        top_p: draw from the smallest set of likeliest tokens that holds this probability.
        min_p: drop tokens less likely than this fraction of the likeliest one's probability.
        repetition_penalty: divide positive and multiply negative logits of tokens that the prompt
            or output contains (CTRL, arXiv 1909.05858); 1 for none.
        frequency_penalty: subtracted for each time that the output contains a token; -2 to 2.
        presence_penalty: subtracted once if the output contains a token; -2 to 2.
        logit_bias: added to the logits of token ids; -100 to 100.
        bad_words: texts that the output will not contain, as whole tokens; needs a tokenizer.
        seed: makes the request reproducible, wherever it stands in a batch; None draws one.
        max_tokens: number of tokens to generate at most; None for all that the context holds.
        min_tokens: tokens to generate before anything may stop the output.
        stop: texts that end the output; needs a tokenizer.
        stop_token_ids: tokens that end the output; they stay in `token_ids`, not in the text.
        ignore_eos: the end-of-text token does not end the output.
        include_stop_str_in_output: keep the stop text (or the stop token's text) in the text.
        logprobs: log-probabilities of the likeliest so many tokens, and of the chosen one, at
            every place of the output; -1 for the whole vocabulary, None for none.
        prompt_logprobs: the same at every place of the prompt. Its prefill runs all layers for
            all tokens, apart from other requests.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: a form that the output is held to; needs a tokenizer and `fkv.LLM` or
            another serving engine.

    Raises:
        SamplingError: a value is out of bounds.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    # A mapping. Sequences and it are kept as tuples, so that parameters are hashable.
    logit_bias: Any = ()
    bad_words: Sequence[str] = ()
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            _set(self, name, _texts(name, getattr(self, name)))
        _set(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        _set(self, "logit_bias", _bias(self.logit_bias))
        _whole("n", self.n, 1, most=_MOST_OUTPUTS, bounds=f"1 to {_MOST_OUTPUTS}")
        _number("temperature", self.temperature, "0 or more", lambda x: x >= 0)
        bounds = "-1 or 0 (all), or a count below 2**31"
        _whole("top_k", self.top_k, -1, most=_MOST, bounds=bounds)
        _number("top_p", self.top_p, "above 0, at most 1", lambda x: 0 < x <= 1)
        _number("min_p", self.min_p, "0 to 1", lambda x: 0 <= x <= 1)
        _number("repetition_penalty", self.repetition_penalty, "above 0", lambda x: x > 0)
        for name in ("frequency_penalty", "presence_penalty"):
            _number(name, getattr(self, name), "-2 to 2", lambda x: -2 <= x <= 2)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1)
        _whole("min_tokens", self.min_tokens, 0, most=_MOST)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _fail("min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}")
        if self.seed is not None:
            bounds = "0 to 2**32 - 1, or None"
            _whole("seed", self.seed, 0, most=2**32 - 1, bounds=bounds)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            _flag(name, getattr(self, name))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                bounds = "-1 (whole vocabulary), a count, or None"
                _whole(name, getattr(self, name), -1, bounds=bounds)
        if self.structured_outputs is not None:
            check_kind(
                "structured_outputs",
                self.structured_outputs,
                StructuredOutputsParams,
                "StructuredOutputsParams(...)",
                SamplingError,
            )
        if self.n > 1 and self.is_greedy:
            _fail("n", self.n, "1 with temperature=0: greedy outputs would all be the same")

    @property
    def is_greedy(self) -> bool:
        """The likeliest token is taken."""
        return self.temperature < 1e-5


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How beam search continues a prompt.

    An output of T tokens (the end-of-text token included) with log-probability s scores
    `s / T ** length_penalty`, the formula of transformers. Above 0 favors long outputs.

    Attributes:
        beam_width: beams that are kept.
        n: outputs returned, best first; None for all beams.
        max_tokens: number of tokens to generate at most.
        length_penalty: exponent of the length.
        early_stopping: True ends once `beam_width` outputs are complete; False once no beam, at
            its present length, can beat the worst of these; "never" once no beam can at any
            length.
        ignore_eos: the end-of-text token does not end an output.
        stop_token_ids: further tokens that end an output.

    Raises:
        SamplingError: a value is out of bounds.
    """

    beam_width: int = 4
    n: int | None = None
    max_tokens: int = 16
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        _set(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        _whole("beam_width", self.beam_width, 1, most=_MOST_OUTPUTS)
        if self.n is not None:
            bounds = f"1 to beam_width={self.beam_width}"
            _whole("n", self.n, 1, most=self.beam_width, bounds=bounds)
        _whole("max_tokens", self.max_tokens, 1)
        # Beyond these, powers of long outputs' lengths are no float32.
        _number("length_penalty", self.length_penalty, "-8 to 8", lambda x: -8 <= x <= 8)
        _flag("ignore_eos", self.ignore_eos)
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            _fail("early_stopping", self.early_stopping, "True, False or 'never'")


def _set(params: object, name: str, value: object) -> None:
    object.__setattr__(params, name, value)


def _is_id(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0


def _fail(name: str, value: object, bounds: str) -> NoReturn:
    raise SamplingError(f"{name}={value!r}; use {bounds}")


def _whole(
    name: str, value: object, least: int, most: float = math.inf, bounds: str | None = None
) -> None:
    whole = int(value) if isinstance(value, numbers.Integral) else None
    if whole is None or isinstance(value, bool) or not least <= whole <= most:
        _fail(name, value, bounds or f"at least {least}")


def _number(name: str, value: object, bounds: str, holds: Callable[[Any], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        _fail(name, value, f"a number, {bounds}")
    # Programs compute in float32, where a tiny number may be 0 and a large one infinite.
    try:
        with np.errstate(over="ignore", under="ignore"):
            single = float(np.float32(float(value)))
    except OverflowError:
        single = math.inf
    if not math.isfinite(single) or not holds(value) or not holds(single):
        _fail(name, value, bounds)


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool | np.bool_):
        _fail(name, value, "True or False")


def _items(name: str, value: object, bounds: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        _fail(name, value, bounds)
    return tuple(value)


def _texts(name: str, value: object) -> tuple[str, ...]:
    bounds = "texts of at least one character"
    texts = (value,) if isinstance(value, str) else _items(name, value, bounds)
    if not all(isinstance(text, str) and text for text in texts):
        _fail(name, value, bounds)
    return texts


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    bounds = "a list of token ids, 0 or more"
    ids = _items(name, value, bounds)
    if not all(_is_id(token) for token in ids):
        _fail(name, value, bounds)
    return tuple(int(token) for token in ids)


def _bias(value: object) -> tuple[tuple[int, float], ...]:
    bounds = "a mapping from token ids to numbers from -100 to 100"
    items = value.items() if isinstance(value, Mapping) else _items("logit_bias", value, bounds)
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in items):
        _fail("logit_bias", value, bounds)
    pairs = dict(items)
    for token, bias in pairs.items():
        number = isinstance(bias, numbers.Real) and not isinstance(bias, bool)
        if not _is_id(token) or not number or not -100 <= float(bias) <= 100:
            _fail("logit_bias", pairs, bounds)
    return tuple(sorted((int(token), float(bias)) for token, bias in pairs.items()))
