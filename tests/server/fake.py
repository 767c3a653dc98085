"""An engine without a model: its answer to everything is one text, a byte a step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from fusedkv_jax.data.tokenizers import ByteTokenizer
from fusedkv_jax.generation import SamplingParams
from fusedkv_jax.generation.results import Logprob
from fusedkv_jax.generation.text import Detokenizer, StopTexts
from fusedkv_jax.serving import EngineStats, OutputDelta, QueueFull

TEXT = "Grüße, 世界! 👩‍🚀 says <|hi|> and 日本語も、한국어도. END "
PAGE = 16


class _Choice:
    def __init__(self, params: SamplingParams, tokenizer: ByteTokenizer):
        self.sent = 0
        self.done = False
        self.text, self.stops = Detokenizer(tokenizer.decode), StopTexts(params.stop)

    def step(self, index: int, params: SamplingParams, limit: int, **more: int) -> OutputDelta:
        token = (TEXT.encode() * (limit // len(TEXT) + 1))[self.sent]
        self.sent += 1
        text = self.stops.push(self.text.push([token]))
        reason = "stop" if self.stops.found else "length" if self.sent >= limit else None
        if reason == "length":
            text += self.stops.push(self.text.flush()) + self.stops.flush()
        self.done = reason is not None
        logprobs = None
        if params.logprobs is not None:
            likely = {token + i: Logprob(-0.5 - i, i + 1) for i in range(params.logprobs or 1)}
            logprobs = (likely,)
        return OutputDelta(
            token_ids=(token,),
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            index=index,
            **more,
        )


class _Request:
    def __init__(self, prompt, params, tokenizer, limit: int, tenant: str):
        self.prompt, self.params, self.limit, self.tenant = tuple(prompt), params, limit, tenant
        self.choices = [_Choice(params, tokenizer) for _ in range(params.n)]
        self.queue: asyncio.Queue[OutputDelta] = asyncio.Queue()
        self.cached = 0
        self.pages = 0

    async def __aiter__(self) -> AsyncIterator[OutputDelta]:
        left = self.params.n
        while left:
            delta = await self.queue.get()
            left -= delta.finish_reason is not None
            yield delta


class FakeEngine:
    """Attributes: `pause` seconds a step takes; `broken` raises in steps; `hung` stops them;
    without `alive` the engine is dead."""

    def __init__(self, max_num_seqs: int = 8, queue: int = 64, pause: float = 0.0):
        self.model_name, self.tokenizer, self.max_length = "toy", ByteTokenizer(), 4096
        self.pause, self.hung, self.broken, self.alive = pause, False, False, True
        self._most, self._bound = max_num_seqs, queue
        self._requests: dict[str, _Request] = {}
        self._seen: set[tuple[str, tuple[int, ...]]] = set()
        self._counts = dict.fromkeys(
            ("prefix_hits", "prefix_queries", "steps", "prompt_tokens", "generated_tokens"), 0
        )
        self.served: list[SamplingParams] = []

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self, drain_seconds: float = 0) -> None:
        self._task.cancel()

    async def prepare(self, params: SamplingParams) -> None:
        """There is nothing to compile."""

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        tenant: str = "",
        client: str | None = None,
    ) -> _Request:
        limit = params.max_tokens or self.max_length - len(prompt)
        if not all(0 <= token < self.tokenizer.vocab_size for token in prompt):
            raise ValueError(f"a token outside the vocabulary of {self.tokenizer.vocab_size}")
        if len(prompt) + limit > self.max_length:
            raise ValueError(f"{len(prompt)} + {limit} tokens; the model takes {self.max_length}")
        self.check_room()
        request = _Request(prompt, params, self.tokenizer, limit, tenant)
        self._requests[request_id] = request
        self.served.append(params)
        return request

    def check_together(self, tokens: Sequence[int]) -> None:
        most = self._most + self._bound
        if len(tokens) > most:
            raise ValueError(f"{len(tokens)} prompts; at most {most} can wait")

    def check_room(self, tokens: int = 0) -> None:
        if len(self._requests) >= self._most + self._bound:
            raise QueueFull("the queue is full", 2.0)

    def abort(self, request_id: str) -> None:
        request = self._requests.pop(request_id, None)
        for index, choice in enumerate(request.choices if request else ()):
            if not choice.done:
                request.queue.put_nowait(OutputDelta(finish_reason="abort", index=index))

    def stats(self) -> EngineStats:
        running = list(self._requests.values())[: self._most]
        return EngineStats(
            running=len(running),
            waiting=len(self._requests) - len(running),
            pages_used=sum(request.pages for request in running),
            pages_total=1000,
            page_size=PAGE,
            **self._counts,
        )

    async def _run(self) -> None:
        while True:
            work = bool(self._requests) and not self.hung
            await asyncio.sleep(self.pause if work else 0.002)
            if work:
                self._step()

    def _step(self) -> None:
        self._counts["steps"] += 1
        for name, request in list(self._requests.items())[: self._most]:
            if self.broken:
                for index in range(request.params.n):
                    delta = OutputDelta(finish_reason="error", error="has NaN", index=index)
                    request.queue.put_nowait(delta)
                del self._requests[name]
                continue
            if not request.pages:
                self._admit(request)
            for index, choice in enumerate(request.choices):
                if not choice.done:
                    more = {"cached_tokens": request.cached, "prompt_tokens": len(request.prompt)}
                    delta = choice.step(index, request.params, request.limit, **more)
                    request.queue.put_nowait(delta)
                    self._counts["generated_tokens"] += 1
            if all(choice.done for choice in request.choices):
                del self._requests[name]

    def _admit(self, request: _Request) -> None:
        starts = range(PAGE, len(request.prompt), PAGE)
        pages = [(request.tenant, request.prompt[:end]) for end in starts]
        request.cached = PAGE * sum(page in self._seen for page in pages)
        self._seen.update(pages)
        request.pages = len(pages) + 1
        self._counts["prompt_tokens"] += len(request.prompt)
        self._counts["prefix_queries"] += len(request.prompt)
        self._counts["prefix_hits"] += request.cached
