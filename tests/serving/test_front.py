"""Many callers of one engine: streams, aborts, bounds of the queue, and its end."""

import asyncio

import pytest

import fusedkv_jax as fkv
from fusedkv_jax.serving import AsyncEngine, QueueFull
from tests.serving.served import GREEDY, LONGEST, all_tokens, engine, prompts, run, tokens


def serve(work, **limits):
    """Runs `work(front)` over an engine that is started, and ended without a drain."""

    async def whole():
        front = AsyncEngine(engine(), **limits)
        await front.start()
        try:
            return await work(front)
        finally:
            await asyncio.wait_for(front.stop(), 60)
            assert not front.alive and front.stats().pages_used == 0

    return asyncio.run(whole())


async def _read(stream):
    return [delta async for delta in stream]


def test_callers_at_once_get_what_each_gets_alone():
    given = prompts(8)
    several = fkv.SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=5)

    async def work(front):
        assert front.max_length == LONGEST
        streams = [front.add(p, GREEDY, request_id=str(i)) for i, p in enumerate(given)]
        streams.append(front.add(given[0], several, request_id="n"))
        return await asyncio.gather(*map(_read, streams))

    *found, outputs = serve(work)
    assert [tokens(deltas) for deltas in found] == all_tokens(run(engine(), given, GREEDY))
    alone = run(engine(), given[:1], several)["0"]
    assert [tokens(outputs, i) for i in range(3)] == [tokens(alone, i) for i in range(3)]


def test_who_leaves_a_stream_aborts_its_request():
    long = fkv.SamplingParams(temperature=0.0, max_tokens=LONGEST - 1)

    async def work(front):
        closed = front.add([1], long, request_id="closed")
        cancelled = front.add([2], long, request_id="cancelled")
        aborted = front.add([3], long, request_id="aborted")
        await anext(closed)
        await closed.aclose()
        task = asyncio.create_task(_read(cancelled))
        await anext(aborted)
        task.cancel()
        front.abort("aborted")
        assert (await _read(aborted))[-1].finish_reason == "abort"
        while front.stats().pages_used:
            await asyncio.sleep(0.01)
        assert front.stats().generated_tokens < 3 * (LONGEST - 1)

    serve(work)


def test_the_queue_is_bounded_and_what_cannot_be_is_refused():
    async def work(front):
        front.add([1], GREEDY, request_id="a")
        front.add([1], GREEDY, request_id="b")
        with pytest.raises(QueueFull) as full:
            front.add([1], GREEDY, request_id="c")
        assert full.value.retry_after > 0
        with pytest.raises(ValueError, match="'a' runs already"):
            front.add([1], GREEDY, request_id="a")
        with pytest.raises(ValueError, match="is the limit"):
            front.add([1] * LONGEST, GREEDY, request_id="d")
        with pytest.raises(ValueError, match="3 prompts; at most max_queued=2 can wait: send"):
            front.check_together([1, 1, 1])

    serve(work, max_queued=2)


def test_prompts_that_are_too_long_to_wait_together():
    async def work(front):
        front.check_together([30])  # alone it need not wait
        front.check_together([10, 10])
        with pytest.raises(ValueError, match="21 tokens; at most max_queued_tokens=20 can wait"):
            front.check_together([10, 11])

    serve(work, max_queued_tokens=20)


def test_a_stop_lets_requests_end_and_aborts_the_rest():
    async def work(front):
        short = front.add([1], GREEDY, request_id="short")
        await asyncio.gather(front.stop(drain_seconds=120), asyncio.sleep(0))
        with pytest.raises(QueueFull, match="stopped"):
            front.add([1], GREEDY, request_id="late")
        return await _read(short)

    assert serve(work)[-1].finish_reason == "length"


def test_nobody_waits_for_an_engine_that_has_died():
    async def work():
        front = AsyncEngine(engine())

        def dies():
            raise KeyboardInterrupt("as a bug would")

        front.engine.step = dies
        await front.start()
        deltas = await _read(front.add([1], GREEDY, request_id="a"))
        assert deltas[-1].finish_reason == "error" and "has lost its engine" in deltas[-1].error
        assert not front.alive and isinstance(front.error, KeyboardInterrupt)
        await front.stop()

    asyncio.run(work())
