"""An engine for many callers at once: a thread runs its steps, streams hand out what comes."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.serving.engine import Deltas, Engine
from fusedkv_jax.serving.intake import AnyPrompt
from fusedkv_jax.serving.output import EngineStats, OutputDelta
from fusedkv_jax.serving.prefix import PrefixChange
from fusedkv_jax.serving.request import RequestError

_log = logging.getLogger(__name__)


class QueueFull(RuntimeError):
    """Too many requests wait; it is worth trying again after `retry_after` seconds."""

    def __init__(self, reason: str, retry_after: float):
        super().__init__(f"{reason}; retry in {retry_after:.0f} s")
        self.retry_after = retry_after


class OutputStream(AsyncIterator[OutputDelta]):
    """The deltas of one request as they come; `aclose` (or leaving the loop by it) aborts it.

    It ends after the last delta of the last of its outputs.
    """

    def __init__(self, front: AsyncEngine, request_id: str, outputs: int):
        self.request_id = request_id
        self._front = front
        self._left = self._open = outputs  # outputs to be read to their end, and to be delivered
        self._ready: asyncio.Queue[OutputDelta] = asyncio.Queue()

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> OutputDelta:
        if not self._left:
            raise StopAsyncIteration
        try:
            delta = await self._ready.get()
        except asyncio.CancelledError:  # whoever reads has gone
            self._abort()
            raise
        self._left -= delta.finish_reason is not None
        return delta

    async def aclose(self) -> None:
        """Abort the request, unless it has ended."""
        self._abort()

    async def __aenter__(self) -> OutputStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._abort()

    def _abort(self) -> None:
        if self._left:
            self._left = 0
            self._front.abort(self.request_id)


class AsyncEngine:
    """An engine whose steps run in a thread of their own; its methods are for the event loop.

    Args:
        engine: the engine; from `start` on nobody else may use it.
        model_name: what the model is called.
        max_queued: requests that may wait.
        max_queued_tokens: tokens that their prompts may come to; None for any number.
        on_changes: called in the thread of the steps with what has become of cached prefixes.

    Attributes:
        model_name, tokenizer, max_length: of the engine.

    Raises:
        ValueError: `on_changes` for an engine that keeps no prefixes.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        model_name: str = "fusedkv_jax",
        max_queued: int = 1024,
        max_queued_tokens: int | None = None,
        on_changes: Callable[[list[PrefixChange]], None] | None = None,
    ):
        self.engine, self.model_name = engine, model_name
        self.tokenizer, self.max_length = engine.tokenizer, engine.max_model_len
        self._limits = max_queued, max_queued_tokens
        self._on_changes = on_changes
        if on_changes is not None:
            engine.scheduler.memory.record_changes()
        self._streams: dict[str, OutputStream] = {}
        self._orders: deque[tuple[Any, ...]] = deque()  # (what to do, arguments)
        self._wanted = threading.Condition()
        self._waiting: dict[str, int] = {}  # request -> prompt tokens, until its first delta
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._accepts = self._stops = False
        self._stats = engine.stats()
        self.error: BaseException | None = None

    async def start(self) -> None:
        """Begin to run steps."""
        if self._thread is not None:
            raise RuntimeError("the engine was started before; make a new one")
        self._loop, self._accepts = asyncio.get_running_loop(), True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stop(self, drain_seconds: float = 0) -> None:
        """Refuse what is new, let requests end for some seconds, abort the others, and end."""
        self._accepts = False
        if self._loop is None or self._thread is None:
            return
        end = self._loop.time() + drain_seconds
        while self._streams and self._thread.is_alive() and self._loop.time() < end:
            await asyncio.sleep(0.01)
        for name in list(self._streams):
            self.abort(name)
        with self._wanted:
            self._stops = True
            self._wanted.notify()
        await asyncio.to_thread(self._thread.join)

    @property
    def alive(self) -> bool:
        """Steps run, or would if anybody asked."""
        return self._thread is not None and self._thread.is_alive() and self.error is None

    async def prepare(self, params: SamplingParams) -> None:
        """As `Engine.prepare`, beside the event loop; before `add`, which then finds it done."""
        if params.structured_outputs is not None:
            await asyncio.to_thread(self.engine.prepare, params)

    def add(
        self,
        prompt: AnyPrompt,
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        tenant: str = "",
        client: str | None = None,
    ) -> OutputStream:
        """Queue a request; arguments as for `Engine.add`.

        Raises:
            ValueError: it can never be served, or its `request_id` runs; the message names the
                limit.
            QueueFull: too much waits already, or the engine stops.
        """
        if not self._accepts or not self.alive:
            raise QueueFull("the engine is stopped", 30)
        if request_id in self._streams:
            raise ValueError(f"request {request_id!r} runs already; choose another request_id")
        checked = self.engine.check(prompt, params, request_id)
        self.check_room(len(checked.prompt))
        stream = self._streams[request_id] = OutputStream(self, request_id, params.n)
        self._waiting[request_id] = len(checked.prompt)
        self._order("add", checked, request_id, priority, tenant, client)
        return stream

    def abort(self, request_id: str) -> None:
        """End a request; its pages are free before the next step. Nothing if it has ended."""
        if request_id in self._streams:
            self._order("abort", request_id)

    def stats(self) -> EngineStats:
        """Figures after the last step."""
        return self._stats

    def check_room(self, tokens: int = 0) -> None:
        """Whether a prompt of so many tokens may wait; to ask before it is read.

        Raises:
            QueueFull: too much waits already.
        """
        most, most_tokens = self._limits
        queued = sum(self._waiting.values())
        if len(self._waiting) >= most:
            raise QueueFull(f"{len(self._waiting)} requests wait", 1 + len(self._waiting) / 100)
        if most_tokens is not None and queued + tokens > most_tokens and self._waiting:
            raise QueueFull(f"{queued} tokens of prompts wait", 1 + queued / 10_000)

    def check_together(self, tokens: Sequence[int]) -> None:
        """Whether prompts of so many tokens each could ever be queued at once.

        Raises:
            ValueError: the queue has never room for all of them; the message names the limit.
        """
        most, most_tokens = self._limits
        advice = "send them in several requests"
        if len(tokens) > most:
            raise ValueError(f"{len(tokens)} prompts; at most max_queued={most} can wait: {advice}")
        # A queue without anybody takes any first prompt, but no second one beyond the limit.
        if most_tokens is not None and len(tokens) > 1 and sum(tokens) > most_tokens:
            raise ValueError(
                f"prompts of {sum(tokens)} tokens; at most max_queued_tokens={most_tokens} can"
                f" wait: {advice}"
            )

    def _order(self, *order: object) -> None:
        with self._wanted:
            self._orders.append(order)
            self._wanted.notify()

    # In the thread.

    def _run(self) -> None:
        try:
            while self._carry_out():
                deltas = self.engine.step()
                self._take_note()
                self._hand_out(deltas)
        except BaseException as error:  # the engine is dead: nobody may wait for it for ever
            self.error = error
            last = OutputDelta(0, finish_reason="error", error=f"has lost its engine: {error}")
            self._call(self._end_all, last)
            _log.exception("the engine died")

    def _carry_out(self) -> bool:
        """Do what was ordered, waiting for it if nobody runs; False when it is time to end."""
        with self._wanted:
            while not (self._orders or self.engine.unfinished or self._stops):
                self._wanted.wait()
            orders, stops = list(self._orders), self._stops
            self._orders.clear()
        for what, *arguments in orders:
            if what == "abort":
                self._hand_out(self.engine.abort(*arguments))
                continue
            try:
                self.engine.put(*arguments)
            except ValueError as error:  # a race of equal names, or a policy that refuses
                reason = error.reason if isinstance(error, RequestError) else str(error)
                refused = OutputDelta(0, finish_reason="error", error=reason)
                self._call(self._end, arguments[1], refused)
        self._take_note()
        return not stops

    def _take_note(self) -> None:
        """Keep the figures of now, and pass on what has become of cached prefixes."""
        self._stats = self.engine.stats()
        if self._on_changes is not None:
            changes = self.engine.scheduler.memory.take_changes()
            if changes:
                self._on_changes(changes)

    def _hand_out(self, deltas: Deltas) -> None:
        if deltas:
            self._call(self._deliver, deltas)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    # In the event loop.

    def _deliver(self, deltas: Deltas) -> None:
        for name, delta in deltas:
            self._waiting.pop(name, None)
            stream = self._streams.get(name)
            if stream is not None:
                stream._ready.put_nowait(delta)
                stream._open -= delta.finish_reason is not None
                if not stream._open:
                    del self._streams[name]

    def _end(self, name: str, delta: OutputDelta) -> None:
        stream = self._streams.get(name)
        if stream is not None:
            self._deliver([(name, delta)] * stream._open)

    def _end_all(self, delta: OutputDelta) -> None:
        for name in list(self._streams):
            self._end(name, delta)
