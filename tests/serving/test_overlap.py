"""Steps that are planned while the device computes the one before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.serving import POLICIES, PagedMemory, Request, Scheduler, StepShapes
from fusedkv_jax.serving.runner import RunningStep
from fusedkv_jax.serving.simulate import simulate
from fusedkv_jax.serving.stand_ins import put_in, stand_in
from tests.serving.served import (
    GREEDY,
    PAGE,
    Json,
    Letters,
    all_tokens,
    engine,
    prompts,
    run,
    tokens,
)


@pytest.fixture
def events(monkeypatch):
    """What runners are asked: the numbers of steps that are started (s) and awaited (r)."""
    seen, numbers, result = [], {}, RunningStep.result

    def awaited(step):
        seen.append(("r", numbers[step]))
        return result(step)

    def started(self, *arguments):
        create(self, *arguments)
        numbers[self] = len(numbers)
        seen.append(("s", numbers[self]))

    create = RunningStep.__init__
    monkeypatch.setattr(RunningStep, "__init__", started)
    monkeypatch.setattr(RunningStep, "result", awaited)
    return seen


def test_a_step_starts_before_the_one_before_is_awaited(events):
    run(engine(), prompts(1), GREEDY)
    assert events[:5] == [("s", 0), ("s", 1), ("r", 0), ("s", 2), ("r", 1)]
    assert len(events) == 2 * GREEDY.max_tokens, "none is computed for nothing"


def test_steps_wait_for_each_other_where_that_is_asked_for(events):
    run(engine(async_scheduling=False), prompts(1), GREEDY)
    assert events[:4] == [("s", 0), ("r", 0), ("s", 1), ("r", 1)]


@pytest.mark.parametrize(
    "params",
    [
        fkv.SamplingParams(
            structured_outputs=fkv.StructuredOutputsParams(regex="[a-z]{8}"), temperature=0.0
        ),
        fkv.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1),
    ],
)
def test_steps_wait_for_what_the_host_decides(events, params):
    run(engine(tokenizer=Json()), prompts(1), params)
    assert events == [(what, step) for step in range(len(events) // 2) for what in "sr"]


@pytest.mark.parametrize("changes", [{}, {"memory": "slots", "num_pages": None}, {"num_pages": 12}])
def test_outputs_are_those_of_steps_that_wait(changes):
    """Some end by a stop token or text, some share a prompt, some are aborted."""
    given = prompts(30)
    free = [fkv.SamplingParams(temperature=1.0, seed=i, max_tokens=12) for i in range(30)]
    drawn = all_tokens(run(engine(tokenizer=Letters(), **changes), given, free))
    stopped = [
        fkv.SamplingParams(
            temperature=1.0,
            seed=i,
            max_tokens=12,
            n=1 + i % 3,
            repetition_penalty=1.0 + i % 2,
            stop=[Letters().decode(drawn[i][5:6])] if i % 4 == 1 else [],
            stop_token_ids=[drawn[i][3]] if i % 4 == 2 else [],
            logprobs=2 if i % 5 == 0 else None,
        )
        for i in range(30)
    ]

    def deltas(overlaps):
        served, found = engine(tokenizer=Letters(), async_scheduling=overlaps, **changes), {}
        for number, (prompt, params) in enumerate(zip(given, stopped, strict=True)):
            served.add(prompt, params, request_id=str(number))
            for name, delta in [*served.step(), *(served.step() if number % 3 else ())]:
                found.setdefault((name, delta.index), []).append(delta)
            if number % 7 == 6:
                served.abort(str(number - 1))
        while served.unfinished:
            for name, delta in served.step():
                found.setdefault((name, delta.index), []).append(delta)
        served.step()  # what was aborted last
        stats = served.stats()
        assert stats.running == stats.waiting == stats.pages_used == 0
        return found

    overlapping, waiting = deltas(True), deltas(False)
    ended = [key for key, own in waiting.items() if own[-1].finish_reason is not None]
    assert len(ended) > 40
    for name, index in ended:
        own, others = overlapping[name, index], waiting[name, index]
        if own[-1].finish_reason is None:
            continue  # it was aborted a step earlier
        assert own[-1].finish_reason == others[-1].finish_reason
        assert tokens(own, index) == tokens(others, index), (name, index)
        assert "".join(d.text for d in own) == "".join(d.text for d in others)


def test_who_ends_by_a_stop_computes_one_token_for_nothing():
    """And the page that held it is found again with the tokens that were there before."""
    served, (prompt,) = engine(num_pages=12), prompts(1)
    (whole,) = all_tokens(run(served, [prompt], GREEDY))
    stop = fkv.SamplingParams(temperature=0.0, stop_token_ids=[whole[6]], max_tokens=12)
    length = whole.index(whole[6]) + 1
    before = served.stats().lower_rows
    (found,) = run(served, [prompt], stop).values()
    assert tokens(found) in (whole[:length], whole[: length - 1])
    cached = found[0].cached_tokens
    assert served.stats().lower_rows - before == len(prompt) - cached + length
    again = run(served, [[*prompt, *whole]], fkv.SamplingParams(temperature=0.0, max_tokens=1))
    assert again["0"][0].cached_tokens >= (len(prompt) + length - 1) // PAGE * PAGE
    expected = run(
        engine(enable_prefix_caching=False),
        [[*prompt, *whole]],
        fkv.SamplingParams(temperature=0.0, max_tokens=1),
    )
    assert tokens(again["0"]) == tokens(expected["0"])


def test_a_step_that_fails_on_the_device_takes_the_one_behind_it_along(monkeypatch):
    served, given = engine(), prompts(24)
    expected = all_tokens(run(engine(), given, GREEDY))
    start, calls = served.runner.start, []

    def fail():
        raise RuntimeError("of the device")

    def fails_later(plan, draws):
        calls.append(plan)
        running = start(plan, draws)
        if len(calls) == 3:
            running.result = fail
        if len(calls) == 4:
            served.runner.pool = _Failed()
        return running

    monkeypatch.setattr(served.runner, "start", fails_later)
    found = run(served, given, GREEDY)
    failed = {r.name for plan in calls[2:4] for r in plan.requests}
    assert 0 < len(failed) < len(given)
    for name, deltas in found.items():
        if name in failed:
            assert "was in a step that failed with RuntimeError" in deltas[-1].error
        else:
            assert tokens(deltas) == expected[int(name)]


class _Failed:
    """An array that a failed program should have given."""

    def is_deleted(self):
        return False

    def block_until_ready(self):
        raise RuntimeError("of the device")


def test_nothing_compiles_whatever_stands_for_tokens():
    from experiments.benchmarks.programs import counted_compilations

    shapes = StepShapes((2, 4), (0, 4), (2, 6), 8)
    served = engine(shapes=shapes, max_num_seqs=4, max_num_batched_tokens=16)
    served.warm_up()
    with counted_compilations() as seconds:
        run(served, prompts(12), GREEDY)
    assert not seconds


def test_stand_ins_are_the_tokens_of_the_sampled_rows():
    latest = jnp.array([7, -1, 9, 0], jnp.int32)
    given = jnp.array([[3, stand_in(0)], [stand_in(2), 5], [stand_in(1), 0]], jnp.int32)
    # A row in which nothing could be drawn has some token; its request ends.
    assert put_in(given, latest).tolist() == [[3, 7], [9, 5], [0, 0]]


def test_the_simulator_plans_a_step_when_the_one_before_begins():
    """Two requests of three steps each; the second comes while the first step of the first runs."""

    def times(overlaps):
        scheduler = Scheduler(PagedMemory(20, 4, reserve=0.0), POLICIES["fcfs"]())
        both = [Request("a", np.arange(4), 3, 0.0), Request("b", np.arange(4, 8), 3, 0.4)]
        records = simulate(both, scheduler, lambda plan: 1.0, overlaps=overlaps)
        return [(each.ttft, each.latency) for each in records]

    assert times(False) == [(1.0, 3.0), (pytest.approx(1.6), pytest.approx(3.6))]
    # The second step was planned at 0, so b begins with the third, at 2.
    assert times(True) == [(1.0, 3.0), (pytest.approx(2.6), pytest.approx(4.6))]


@pytest.mark.parametrize("changes", [{}, {"memory": "slots", "num_pages": None}])
def test_a_step_that_draws_nothing_is_awaited_too(changes, monkeypatch):
    """Or all chunks of a long prompt would lie before what comes next."""
    awaited, ready = [], jax.block_until_ready

    def until_ready(tree):
        awaited.extend(jax.tree.leaves(tree))
        return ready(tree)

    monkeypatch.setattr(jax, "block_until_ready", until_ready)
    run(engine(max_num_batched_tokens=8, **changes), [list(range(20))], GREEDY)
    assert len(awaited) == 2, "two of three chunks"
    assert all(isinstance(x, jax.Array) and x.size for x in awaited)
