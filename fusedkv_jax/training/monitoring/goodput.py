"""Goodput: the share of a run's wall time that went into steps that count, and where it did not."""

import time
from collections.abc import Callable

PRODUCTIVE = "steps"


class Goodput:
    """A clock that always runs for exactly one of several named activities.

    Productive is the time of `steps`; everything else is lost to what its name says. A run that
    resumed from a checkpoint and computes steps again, which it had computed before it was
    killed, does so under `repeated steps`.

    Args:
      activity: what is going on at the start.
      clock: seconds, monotonic.
    """

    def __init__(self, activity: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._activity = activity
        self._since = clock()
        self._seconds: dict[str, float] = {}

    def switch(self, activity: str) -> None:
        """From now on time belongs to `activity`."""
        now = self._clock()
        spent = self._seconds.get(self._activity, 0.0) + now - self._since
        self._seconds[self._activity] = spent
        self._activity, self._since = activity, now

    def seconds(self) -> dict[str, float]:
        """Each activity's time so far, in seconds."""
        self.switch(self._activity)
        return dict(self._seconds)

    def fractions(self) -> dict[str, float]:
        """Each activity's share of the wall time so far, largest first; they add up to 1."""
        self.switch(self._activity)
        total = sum(self._seconds.values()) or 1.0
        ranked = sorted(self._seconds.items(), key=lambda item: -item[1])
        return {name: seconds / total for name, seconds in ranked}

    def summary(self) -> str:
        """One line, such as "goodput 91.3 % of 12.5 s; lost to compilation 6.1 %, saving 2.6 %"."""
        fractions = self.fractions()
        productive = fractions.pop(PRODUCTIVE, 0.0)
        total = sum(self._seconds.values())
        lost = ", ".join(f"{name} {share:.1%}" for name, share in fractions.items())
        return f"goodput {productive:.1%} of {total:,.1f} s" + (f"; lost to {lost}" if lost else "")
