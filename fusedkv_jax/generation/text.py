"""Text of tokens as they come: whole characters only, and never a part of a stop text.

A character may be spread over several tokens, and a stop text over several characters; both are
held back until it is known what they become. What was handed out is never taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"  # what decoders put for bytes that are not (yet) a character


class Detokenizer:
    """Tokens in, the text that they add out.

    Decoders treat the first token specially and join bytes over tokens, so tokens are decoded
    together with some before them: those back to the last place but one at which a character ended.

    Args:
        decode: text of token ids.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._window: list[int] = []
        self._last_end = 0  # tokens of the window up to which its text was whole
        self._given = 0  # characters of the window's text that were handed out

    def push(self, tokens: Sequence[int]) -> str:
        """The characters that the tokens complete."""
        self._window.extend(tokens)
        text = self._decode(self._window)
        whole = text.rstrip(_UNFINISHED)
        new = whole[self._given :]
        self._given = max(self._given, len(whole))
        if len(whole) == len(text) and new:
            del self._window[: self._last_end]
            self._last_end = len(self._window)
            self._given = len(self._decode(self._window))
        return new

    def flush(self) -> str:
        """What is left at the end: bytes that did not become a character, as U+FFFD."""
        text = self._decode(self._window)
        new = text[self._given :]
        self._given = len(text)
        return new


class StopTexts:
    """Text in, the text that may be shown out, up to the first stop text.

    The first is the one that is complete first; of two that end together, the longer one. So the
    outcome does not depend on how the text was cut into pieces.

    Args:
        stops: texts that end the output.
        include: show the stop text too.

    Attributes:
        found: the stop text that has come, or None.
    """

    def __init__(self, stops: Sequence[str], include: bool = False):
        self._stops = sorted(stops, key=len, reverse=True)
        self._include = include
        self._tail = ""  # what a stop text may still begin in
        self._held = 0  # characters at the end of the tail that were not shown
        self.found: str | None = None

    def push(self, text: str, armed: bool = True) -> str:
        """More text; one that is not `armed` completes no stop text, but may begin one."""
        whole = self._tail + text
        hidden = len(self._tail) - self._held
        end, stop = self._first(whole, len(self._tail)) if armed else (0, None)
        if stop is not None:
            self.found = stop
            self._tail, self._held = "", 0
            return whole[hidden : end if self._include else end - len(stop)]
        self._held = 0 if self._include else self._beginning(whole)
        shown = whole[hidden : len(whole) - self._held]
        longest = len(self._stops[0]) - 1 if self._stops else 0
        self._tail = whole[len(whole) - min(longest, len(whole)) :]
        return shown

    def flush(self) -> str:
        """What was held back, at the end of the output."""
        shown = self._tail[len(self._tail) - self._held :]
        self._tail, self._held = "", 0
        return shown

    def _first(self, text: str, old: int) -> tuple[int, str | None]:
        """End and stop text of the first match that ends after `old` characters."""
        found = (len(text) + 1, None)
        for stop in self._stops:
            start = text.find(stop, max(0, old - len(stop) + 1))
            if start >= 0 and start + len(stop) < found[0]:
                found = (start + len(stop), stop)
        return found

    def _beginning(self, text: str) -> int:
        """Characters at the text's end that a stop text begins with."""
        longest = len(self._stops[0]) - 1 if self._stops else 0
        for size in range(min(longest, len(text)), 0, -1):
            if any(len(stop) > size and stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
