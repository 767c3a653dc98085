"""Whether drafting pays, by what steps have taken."""

from __future__ import annotations

import bisect
import math
import statistics
from collections import deque
from collections.abc import Sequence

_REMEMBERED = 8  # steps of each way
_TRIAL = 4  # steps in a row of the way that is slower
_FIRST, _LONGEST = 16, 512  # steps between two trials, twice as many while nothing changes


class DraftSwitch:
    """Leaves drafts out where steps that check them take longer for each token.

    What a draft costs depends on how many requests share a step, and what it gives on their texts.
    So each size of a step is judged by itself, by its own last steps, and the way that
    is slower is tried again now and then. The first steps draft. vLLM's `disable_by_batch_size` has
    the number of requests set by hand instead.

    Args:
        sizes: numbers of rows that steps are rounded up to, ascending.
    """

    def __init__(self, sizes: Sequence[int]):
        self._sizes = sizes
        self._choices = [_Choice() for _ in sizes]

    def drafts(self, requests: int) -> bool:
        """Whether a step of so many requests should check drafts."""
        return self._choice(requests).drafts

    def took(self, requests: int, drafted: bool, seconds: float, tokens: int) -> None:
        """Take in a step.

        Args:
            requests: in the step.
            drafted: whether it has checked drafts.
            seconds: that it took, drafting included.
            tokens: that came of it, of all requests.
        """
        self._choice(requests).took(drafted, seconds, tokens / requests)

    def _choice(self, requests: int) -> _Choice:
        return self._choices[bisect.bisect_left(self._sizes, requests)]


class _Choice:
    """Between the two ways to take a step of one size."""

    def __init__(self) -> None:
        self._paces = {drafted: _Pace() for drafted in (True, False)}
        self._faster = True
        self._left, self._between = _FIRST, _FIRST  # steps until the next trial

    @property
    def drafts(self) -> bool:
        return self._faster if self._left > 0 else not self._faster

    def took(self, drafted: bool, seconds: float, tokens: float) -> None:
        wanted = self.drafts
        self._paces[drafted].add(seconds, tokens)
        if drafted != wanted:
            return  # nothing was found to draft, which says how fast plain steps are
        self._left -= 1
        if self._left > -_TRIAL:
            return
        faster = self._paces[True].seconds <= self._paces[False].seconds
        self._between = min(2 * self._between, _LONGEST) if faster == self._faster else _FIRST
        self._faster, self._left = faster, self._between


class _Pace:
    """Seconds that a token of one request takes."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._tokens: deque[float] = deque(maxlen=_REMEMBERED)

    def add(self, seconds: float, tokens: float) -> None:
        self._seconds.append(seconds)
        self._tokens.append(tokens)

    @property
    def seconds(self) -> float:
        """The median of the steps', as one that compiles or is held up says nothing of the next."""
        if not self._seconds:
            return math.inf
        return statistics.median(self._seconds) / statistics.fmean(self._tokens)
