"""The engine's streams of one HTTP request: added together, measured, and aborted when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.server.errors import ApiError, overloaded
from fusedkv_jax.serving import QueueFull, RequestError

if TYPE_CHECKING:
    from fusedkv_jax.server.metrics import Metrics, Stopwatch
    from fusedkv_jax.server.running import Running
    from fusedkv_jax.serving import AsyncEngine, OutputDelta, OutputStream


class Grown(NamedTuple):
    """What a choice has grown by.

    Attributes:
        choice: its number among all choices of the request.
        prompt: the number of its prompt.
        delta: the engine's.
    """

    choice: int
    prompt: int
    delta: OutputDelta


class Order(NamedTuple):
    """What a client wants.

    Attributes:
        prompts: token ids, one list for each prompt.
        params: of all prompts.
        priority: lower is more urgent.
        tenant: whose pages it may share.
        client: whose it is, for fair sharing.
    """

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    priority: int = 0
    tenant: str = ""
    client: str = ""


class Generation:
    """One request of a client, as a context: what is unfinished at its end is aborted.

    Args:
        engine: runs it.
        running: is told of it.
        metrics: likewise.
        name: of the request; the engine's requests are called `name-0`, `name-1`, ...
        order: what it asks for.

    Attributes:
        prompts: token ids.
        cached_tokens: tokens of the prompts that were not computed again.
        completion_tokens: tokens generated so far.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        running: Running,
        metrics: Metrics,
        name: str,
        order: Order,
    ):
        self.prompts = prompts = order.prompts
        self.completion_tokens = 0
        self._engine, self._running, self._metrics = engine, running, metrics
        self._params, self._order = order.params, order
        self._names = [f"{name}-{number}" for number in range(len(prompts))]
        self._streams: list[OutputStream] = []
        self._unfinished: dict[str, int] = {}  # choices of an engine's request
        self._watches: dict[int, Stopwatch] = {}
        self._cached = [0] * len(prompts)

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached)

    def __enter__(self) -> Generation:
        """Hand the prompts to the engine.

        Raises:
            ApiError: 400 for what can never fit, 503 while the queue is full or the server ends.
        """
        if not self._running.open:
            raise overloaded("the server is shutting down; ask another one", 1)
        try:
            for name, prompt in zip(self._names, self.prompts, strict=True):
                self._add(name, prompt)
        except QueueFull as error:
            self.close()
            raise overloaded(f"{error}", error.retry_after) from None
        except ValueError as error:
            self.close()
            if not isinstance(error, RequestError):
                raise ApiError(400, str(error), param="prompt") from None
            # The client knows nothing of the name that the engine has for the request.
            raise ApiError(400, f"the request {error.reason}", param=error.param) from None
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Abort what is unfinished; its pages are free within a step."""
        for name in [*self._unfinished]:
            self._engine.abort(name)
            self._leave(name)
        for watch in self._watches.values():
            watch.finish("abort")  # those that have finished keep their reason

    async def __aiter__(self) -> AsyncIterator[Grown]:
        """What the choices grow by, until all have finished.

        Raises:
            ApiError: the engine could not go on with one of them.
        """
        if len(self._streams) == 1:
            async for delta in self._streams[0]:
                yield self._take(0, delta)
            return
        queue: asyncio.Queue[tuple[int, OutputDelta | None]] = asyncio.Queue()

        async def pump(number: int, stream: OutputStream) -> None:
            try:
                async for delta in stream:
                    queue.put_nowait((number, delta))
            finally:
                queue.put_nowait((number, None))

        pumps = [asyncio.create_task(pump(i, s)) for i, s in enumerate(self._streams)]
        try:
            left = len(pumps)
            while left:
                number, delta = await queue.get()
                if delta is None:
                    left -= 1
                    await pumps[number]  # raises what ended it
                else:
                    yield self._take(number, delta)
        finally:
            for task in pumps:
                task.cancel()

    def _add(self, name: str, prompt: Sequence[int]) -> None:
        order = self._order
        stream = self._engine.add(
            prompt,
            order.params,
            request_id=name,
            priority=order.priority,
            tenant=order.tenant,
            client=order.client,
        )
        self._streams.append(stream)
        self._running.enter(name)
        self._unfinished[name] = self._params.n
        first = (len(self._streams) - 1) * self._params.n
        for choice in range(first, first + self._params.n):
            self._watches[choice] = self._metrics.start(len(prompt))

    def _take(self, number: int, delta: OutputDelta) -> Grown:
        choice = number * self._params.n + delta.index
        watch = self._watches[choice]
        self._cached[number] = max(self._cached[number], delta.cached_tokens)
        self.completion_tokens += len(delta.token_ids)
        watch.tokens(len(delta.token_ids))
        if delta.finish_reason is not None:
            watch.finish(delta.finish_reason)
            name = self._names[number]
            self._unfinished[name] -= 1
            if not self._unfinished[name]:
                self._leave(name)
        if delta.finish_reason == "error":
            raise ApiError(500, f"the request {delta.error or 'cannot be continued'}")
        return Grown(choice, number, delta)

    def _leave(self, name: str) -> None:
        del self._unfinished[name]
        self._running.leave(name)
