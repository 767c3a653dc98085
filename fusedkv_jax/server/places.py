"""Where tokens begin in the text that a client sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from fusedkv_jax.generation.text import Detokenizer


class Echo(NamedTuple):
    """A prompt as it is shown before its choices.

    Attributes:
        text: what is shown.
        tokens: of the prompt; those that the text leaves out too.
        offsets: where each begins in the text; none where they are not asked for.
    """

    text: str
    tokens: Sequence[int]
    offsets: Sequence[int] = ()


class Offsets:
    """Where tokens begin in a text, which may leave special ones out.

    Tokens of one character all begin where it does.

    Args:
        decode: text of token ids, as it is shown.
        start: of the first.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], start: int = 0):
        self._text, self._end = Detokenizer(decode), start

    def of(self, tokens: Iterable[int]) -> list[int]:
        """Those of the next tokens."""
        found: list[int] = []
        for token in tokens:
            found.append(self._end)
            self._end += len(self._text.push([token]))
        return found
