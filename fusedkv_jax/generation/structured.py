"""What an output must look like: vLLM's parameters of structured outputs, checked at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

_KINDS = ("json", "regex", "choice", "grammar", "json_object")


class StructuredOutputsError(ValueError):
    """A parameter that cannot be; the message names it."""


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The form that an output is held to: exactly one of the first five. Names are vLLM's.

    Attributes:
        json: a JSON schema, as a mapping or as text; kept as text.
        regex: a regular expression (of Rust's `regex`) that the whole output matches.
        choice: texts, of which the output is one.
        grammar: a context-free grammar, in Lark's syntax or in GBNF.
        json_object: True for any JSON object.
        disable_any_whitespace: JSON has no whitespace between its parts. Otherwise a model may put
            there as much as it likes.
        whitespace_pattern: a regular expression for that whitespace.

    Raises:
        StructuredOutputsError: none or several of the five, or one of the wrong kind. Whether a
            schema, an expression or a grammar is valid is told when a request is added.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.json, Mapping):
            try:
                object.__setattr__(self, "json", json.dumps(self.json, allow_nan=False))
            except (TypeError, ValueError, RecursionError) as error:
                _fail("json", f"is no JSON: {error}")
        if self.choice is not None:
            if isinstance(self.choice, str) or not isinstance(self.choice, Sequence):
                _fail("choice", f"is {self.choice!r}; use a list of texts")
            object.__setattr__(self, "choice", tuple(self.choice))
            if not self.choice or not all(isinstance(x, str) and x for x in self.choice):
                _fail("choice", "needs texts of at least one character")
        for name in ("json", "regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                _fail(name, f"is {value!r}; use a text")
        for name in ("json_object", "disable_any_whitespace"):
            if getattr(self, name) not in (None, True, False):
                _fail(name, f"is {getattr(self, name)!r}; use True or False")
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            what = " and ".join(given) or "nothing"
            raise StructuredOutputsError(
                f"structured_outputs has {what}; give one of {', '.join(_KINDS)}"
            )

    @property
    def kind(self) -> str:
        """Which of the five it is."""
        return next(name for name in _KINDS if getattr(self, name) not in (None, False))


def _fail(name: str, reason: str) -> NoReturn:
    raise StructuredOutputsError(f"structured_outputs: {name} {reason}")
