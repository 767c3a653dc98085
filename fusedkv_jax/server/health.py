"""Whether the engine still makes tokens: seen from its count, or else by one that is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from typing import TYPE_CHECKING

from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.serving import QueueFull

if TYPE_CHECKING:
    from fusedkv_jax.serving import AsyncEngine

_PROBE = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)


class Health:
    """Answers probes. Many at once, or within `fresh` seconds, cost one token.

    Args:
        engine: that is asked.
        timeout: seconds that a token may take.
        fresh: seconds for which an engine that has made a token counts as alive.
    """

    def __init__(self, engine: AsyncEngine, timeout: float = 30.0, fresh: float = 5.0):
        self._engine, self._timeout, self._fresh = engine, timeout, fresh
        self._lock = asyncio.Lock()
        self._count, self._seen = 0, -math.inf
        self._numbers = itertools.count()

    async def alive(self) -> bool:
        """Whether it makes tokens."""
        async with self._lock:
            if not self._engine.alive:
                return False
            if self._working():
                return True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timeout):
                    return await self._token()
            return self._working()

    def _working(self) -> bool:
        """Whether it has made a token a short while ago, as far as is known."""
        count, now = self._engine.stats().generated_tokens, time.monotonic()
        if count != self._count:
            self._count, self._seen = count, now
        return now - self._seen < self._fresh

    async def _token(self) -> bool:
        """One token; while the queue is full, another request's."""
        name = f"health-{next(self._numbers)}"
        try:
            stream = self._engine.add([0], _PROBE, request_id=name)
        except QueueFull:
            while not self._working():
                await asyncio.sleep(0.05)
            return True
        except Exception:  # whatever it is, the engine takes no requests
            return False
        try:
            async for delta in stream:
                if delta.finish_reason is not None:
                    return delta.finish_reason != "error"
            return False
        finally:
            self._engine.abort(name)
            self._working()
