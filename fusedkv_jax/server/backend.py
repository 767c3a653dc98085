"""What the server needs of an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fusedkv_jax.generation.params import SamplingParams


class QueueFull(Exception):
    """No room in the queue; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True)
class Delta:
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Any, ...] | None = None
    finish_reason: Literal["stop", "length", "abort", "error"] | None = None
    index: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    prefix_hits: int = 0
    prefix_queries: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0


Stream = AsyncIterator[Delta]


class AsyncEngine(Protocol):
    model_name: str
    tokenizer: Any
    max_length: int

    async def start(self) -> None: ...
    async def stop(self, drain_seconds: float = 0) -> None: ...
    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        tenant: str = "",
    ) -> Stream: ...
    def abort(self, request_id: str) -> None: ...
    def stats(self) -> EngineStats: ...
