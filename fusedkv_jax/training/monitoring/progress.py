"""Progress of long work: a bar with rate and time left in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm


class Progress:
    """Counts steps of a known total; use it as a context manager.

    In a terminal (standard error is a TTY) it draws one tqdm bar there. Elsewhere it draws
    nothing, and `time_left` gives log lines the same figure. `print` writes a line to standard
    output without breaking the bar.

    Args:
      total: number of steps.
      done: steps that were done before (of a resumed run); they do not count for the rate.
      label: what the bar is called.
      silent: show and print nothing.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        label: str = "",
        unit: str = "step",
        silent: bool = False,
    ) -> None:
        self.total = total
        self.done = done
        self._first = done
        self._start = time.perf_counter()
        self._silent = silent
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            unit=unit,
            dynamic_ncols=True,
            disable=silent or not sys.stderr.isatty(),
        )

    def advance(self, steps: int = 1) -> None:
        """Count `steps` more."""
        self.done += steps
        self._show(lambda: self._bar.update(steps))

    def restart_clock(self) -> None:
        """Measure the rate from now on, for instance after a compilation."""
        self._first = self.done
        self._start = time.perf_counter()
        self._show(self._bar.unpause)

    def time_left(self) -> str:
        """The estimated time to the end, such as "02:30", or "?" before the first step."""
        steps = self.done - self._first
        if steps == 0:
            return "?"
        per_step = (time.perf_counter() - self._start) / steps
        return tqdm.format_interval(per_step * (self.total - self.done))

    def print(self, line: str) -> None:
        """Write one line to standard output, above the bar if there is one."""

        def write() -> None:
            with tqdm.external_write_mode(file=sys.stdout):
                print(line, flush=True)

        self._show(write)

    def _show(self, write: Callable[[], object]) -> None:
        """Write, until a terminal or pipe has closed: work outlives its reader."""
        if self._silent:
            return
        try:
            write()
        except OSError:
            self._silent = True

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._show(self._bar.close)
