"""Structured outputs: which tokens may come next, by llguidance (the extra `structured`)."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedkv_jax.generation.requests import Codec
from fusedkv_jax.generation.structured import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Bounds of what one request may cost: with them a schema of 2,000 properties and the worst
# expression that was found take a few seconds, with the library's own ten and more.
_LONGEST = 1 << 16  # characters of a schema, an expression or a grammar
_FUEL = 100_000
_KEPT = 64  # compiled grammars, for the requests that repeat one


class Constraint:
    """Where one output stands in its grammar.

    Args:
        matcher: at the beginning of the grammar; it is the constraint's own.
    """

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def mask(self, drafts: Sequence[int] = ()) -> np.ndarray:
        """A bit for each token, 1 where it may come next: int32 [words], the lowest bit first.

        Args:
            drafts: tokens that would come before it; `allowed` ones.
        """
        self._matcher.consume_tokens(list(drafts))
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        self._matcher.rollback(len(drafts))
        return mask

    def allowed(self, drafts: Sequence[int]) -> int:
        """How many of these tokens may come one after the other."""
        return self._matcher.validate_tokens(list(drafts))

    def accept(self, token: int) -> None:
        """The output goes on with a token."""
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Nothing but the end of the text may follow."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why it cannot be followed any further: a grammar that takes too much work."""
        return _line(self._matcher.get_error()) if self._matcher.is_error() else None


class Grammars:
    """Compiles grammars over the vocabulary of a model.

    Args:
        codec: its tokenizer must tell the bytes of its tokens, as those of
            `fusedkv_jax.data.tokenizers` do.
        vocab_size: V of the model.

    Attributes:
        words: 32-bit words of a mask.
    """

    def __init__(self, codec: Codec, vocab_size: int):
        self._codec, self._size = codec, vocab_size
        # One id more than the model has stands for an end of the text that it does not have.
        self.words = vocab_size // 32 + 1
        self._matcher = functools.lru_cache(_KEPT)(self._compile)

    def check(self, params: StructuredOutputsParams) -> None:
        """Raises ValueError, a line, for what cannot be followed; any thread may ask."""
        self._matcher(params)

    def constraint(self, params: StructuredOutputsParams) -> Constraint:
        """The beginning of an output. Raises ValueError as `check`."""
        return Constraint(self._matcher(params).deep_copy())

    def warm_up(self) -> None:
        """Read the vocabulary (a second for a large one), if the library is there."""
        try:
            _ = self._vocabulary
        except ValueError:
            return

    def _compile(self, params: StructuredOutputsParams) -> LLMatcher:
        vocabulary = self._vocabulary
        import llguidance

        limits = llguidance.LLParserLimits(initial_lexer_fuel=_FUEL, verbose_errors=False)
        matcher = llguidance.LLMatcher(vocabulary, _grammar(params), log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(f"structured_outputs: {params.kind}: {_line(matcher.get_error())}")
        return matcher

    @functools.cached_property
    def _vocabulary(self) -> LLTokenizer:
        try:
            import llguidance
        except ImportError:
            raise ValueError(
                "structured_outputs need llguidance; install fusedkv_jax's extra 'structured'"
            ) from None
        tokenizer: Any = self._codec.tokenizer
        eos = self._size if self._codec.eos_id is None else self._codec.eos_id
        if hasattr(tokenizer, "to_str"):
            return llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=self._size + 1, eos_token=eos)
        if not hasattr(tokenizer, "decode_bytes"):
            raise ValueError(
                "structured_outputs need a tokenizer that tells the bytes of its tokens; pass one"
                " of fusedkv_jax.data.tokenizers"
            )
        words = llguidance.TokenizerWrapper(_Words(tokenizer, self._size, eos))
        return llguidance.LLTokenizer(words, eos_token=eos)


class _Words:
    """A tokenizer with `decode_bytes`, as llguidance takes one.

    Tokens without bytes, and those that the model has beyond the tokenizer's, are special: no
    grammar asks for them.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Any, size: int, eos: int):
        known = range(min(tokenizer.vocab_size, size))
        spelled = [tokenizer.decode_bytes([token]) for token in known]
        spelled += [b""] * (size + 1 - len(spelled))
        self.eos_token_id, self._tokenizer = eos, tokenizer
        self.special_token_ids = [token for token, text in enumerate(spelled) if not text]
        self.tokens = [text or f"<|{token}|>".encode() for token, text in enumerate(spelled)]

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return list(self._tokenizer.encode(text))


def _grammar(params: StructuredOutputsParams) -> str:
    """The grammar, in llguidance's form."""
    import llguidance

    kind: Any = params.kind
    text = '{"type": "object"}' if kind == "json_object" else getattr(params, kind)
    if kind == "choice":
        text = json.dumps(text, ensure_ascii=False)
    if len(text) > _LONGEST:
        raise ValueError(f"structured_outputs: {kind} has {len(text)} characters; use {_LONGEST}")
    try:
        if kind in ("regex", "choice", "grammar"):
            return llguidance.grammar_from(kind, text)
        json.loads(text)
        options: Any = {"whitespace_flexible": not params.disable_any_whitespace}
        if params.whitespace_pattern is not None:
            options["whitespace_pattern"] = params.whitespace_pattern
        return llguidance.LLMatcher.grammar_from_json_schema(text, defaults=options)
    except RecursionError:
        raise ValueError(f"structured_outputs: {kind} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"structured_outputs: {kind}: {_line(str(error))}") from None


def _line(text: str) -> str:
    """The beginning of a message, in one line."""
    return " ".join(text.split())[:300]
