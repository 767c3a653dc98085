"""How long JAX has traced, lowered and compiled: rates of generation leave it out."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax

EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",  # also when a program is read from the disk
)


class CompileTime:
    """The times at which this process compiled, as JAX reports them."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []  # that do not overlap, in order

    def listen(self, event: str, duration_secs: float, **_: Any) -> None:
        """Takes in what has just ended."""
        if event in EVENTS:
            self.add(time.perf_counter() - duration_secs, time.perf_counter())

    def add(self, start: float, end: float) -> None:
        """Takes in a span that ends after all others."""
        # Functions are traced within functions, and the inner ones are told first.
        while self._spans and self._spans[-1][1] > start:
            start = min(start, self._spans.pop()[0])
        self._spans.append((start, end))

    def since(self, start: float) -> float:
        """Seconds of compiling after `start`, a time of `time.perf_counter`."""
        total = 0.0
        for begin, end in reversed(self._spans):
            if end <= start:
                break
            total += end - max(begin, start)
        return total


@functools.cache
def compile_time() -> CompileTime:
    """That of this process, from the first call on."""
    found = CompileTime()
    jax.monitoring.register_event_duration_secs_listener(found.listen)
    return found
