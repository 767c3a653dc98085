"""A line in the log every few seconds, as long as there is something to say."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusedkv_jax.serving import AsyncEngine, EngineStats

_log = logging.getLogger(__name__)


async def log_statistics(engine: AsyncEngine, interval: float) -> None:
    """Log rates and gauges every `interval` seconds, without end; quiet when idle."""
    if not interval:
        return
    before, then = engine.stats(), time.monotonic()
    while True:
        await asyncio.sleep(interval)
        stats, now = engine.stats(), time.monotonic()
        if stats.running or stats.waiting or stats.steps != before.steps:
            _log.info("%s", describe(before, stats, now - then))
        before, then = stats, now


def describe(before: EngineStats, stats: EngineStats, seconds: float) -> str:
    """What an engine did in some seconds, in one line."""
    prompt = (stats.prompt_tokens - before.prompt_tokens) / seconds
    generated = (stats.generated_tokens - before.generated_tokens) / seconds
    used = stats.pages_used / max(1, stats.pages_total)
    hits = stats.prefix_hits / max(1, stats.prefix_queries)
    return (
        f"prompt {prompt:,.1f} tokens/s, generation {generated:,.1f} tokens/s, running "
        f"{stats.running}, waiting {stats.waiting}, pages {used:.1%}, prefix hits {hits:.1%}"
    )
