"""Steps that fail, are for nobody or are long over while others are under way."""

import time

import jax.numpy as jnp
import numpy as np
from flax import nnx

import fusedkv_jax as fkv
from fusedkv_jax.serving import POLICIES, PagedMemory, Request, Scheduler
from fusedkv_jax.serving.copies import Direction
from tests.serving.served import GREEDY, Json, all_tokens, engine, model, prompts, run, tokens


def fail(*_):
    raise RuntimeError("of the device")


class Failed:
    """An array that a failed program should have given."""

    def is_deleted(self):
        return False

    def block_until_ready(self):
        fail()


def test_who_had_ended_leaves_with_the_step_that_fails(monkeypatch):
    """It is awaited at once, and has a part in it for nothing."""
    served, (prompt, other) = engine(tokenizer=Json()), prompts(2)
    (whole,) = all_tokens(run(served, [prompt], GREEDY))
    stop = fkv.SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=[whole[2]])
    form = fkv.StructuredOutputsParams(regex="[a-z]{8}")
    held = fkv.SamplingParams(temperature=0.0, max_tokens=8, structured_outputs=form)
    served.add(prompt, stop, request_id="ends")
    for _ in range(whole.index(whole[2]) + 1):
        served.step()
    served.add(other, held, request_id="fails")
    start, plans = served.runner.start, []

    def fails(plan, draws):
        running = start(plan, draws)
        running.result = fail
        plans.append(plan)
        return running

    with monkeypatch.context() as patch:
        patch.setattr(served.runner, "start", fails)
        reasons = {name: delta.finish_reason for name, delta in served.step()}
    assert [request.name for request in plans[0].requests] == ["ends", "fails"]
    assert reasons == {"ends": "stop", "fails": "error"}
    assert served.stats().running == served.stats().pages_used == 0
    assert all_tokens(run(served, [prompt], GREEDY)) == [whole]


def test_tokens_that_were_never_drawn_fail_no_later_step(monkeypatch):
    served, given = engine(), prompts(24)
    expected = all_tokens(run(engine(), given, GREEDY))
    start, plans = served.runner.start, []

    def fails(plan, draws):
        plans.append(plan)
        running = start(plan, draws)
        if len(plans) == 3:
            running.result, served.runner._latest = fail, Failed()
        return running

    monkeypatch.setattr(served.runner, "start", fails)
    found = run(served, given, GREEDY)
    failed = {request.name for plan in plans[2:4] for request in plan.requests}
    assert 0 < len(failed) < len(given)
    for name, deltas in found.items():
        assert (deltas[-1].finish_reason == "error") == (name in failed)
        assert name in failed or tokens(deltas) == expected[int(name)]


def test_what_a_failed_step_has_not_copied_is_computed_again(monkeypatch):
    policy = POLICIES["layer_kv"](tpot=1e3, spare=1e-9)
    served, given = engine(num_pages=16, host_pages=400, policy=policy), prompts(24)
    expected = all_tokens(run(engine(), given, GREEDY))
    carry_out, failed = served.runner._carry_out, []

    def fails_once(copies):
        if not failed and sum(copy.direction is Direction.OUT for copy in copies) > 2:
            failed.append(copies)
            fail()
        return carry_out(copies)

    monkeypatch.setattr(served.runner, "_carry_out", fails_once)
    found = run(served, given, GREEDY)
    ended = [deltas[-1].finish_reason == "error" for deltas in found.values()]
    assert failed and 0 < sum(ended) < len(given)
    for number, deltas in enumerate(found.values()):
        assert ended[number] or tokens(deltas) == expected[number]
    assert all_tokens(run(served, given, GREEDY)) == expected, "prefixes that were found"


def test_who_was_swapped_out_begins_again_where_pages_are_lost():
    memory = PagedMemory(8, 4, host_pages=20, reserve=0.0)
    scheduler = Scheduler(memory, POLICIES["fcfs"](on_eviction="swap"))
    for number in range(2):
        scheduler.add(Request(str(number), np.full(13, number), 12, arrival=number), 0.0)
    while not scheduler.preemptions:
        plan = scheduler.schedule(0.0)
        scheduler.finish(plan, [9] * len(plan.requests), 0.0, 1.0)
    (swapped,) = scheduler.waiting
    length = swapped.length
    scheduler.restart(0.0)
    assert memory.host is not None and memory.host.available == 20
    assert memory.available == 8 and not list(memory.tree.nodes())
    assert memory.take_copies() == [] and swapped.computed == 0 and swapped.length == length
    while scheduler.unfinished:
        plan = scheduler.schedule(0.0)
        scheduler.finish(plan, [9] * len(plan.requests), 0.0, 1.0)
    assert swapped.generated == 12


def test_prefixes_are_tokens_where_nothing_could_be_drawn():
    broken = nnx.clone(model())
    broken.embedding[...] = broken.embedding[...].at[60].set(jnp.nan)
    served = engine(broken)
    served.scheduler.memory.record_changes()
    run(served, [[1, 2, 60]], GREEDY)  # a page with the token that is computed for nothing
    (change,) = served.scheduler.memory.take_changes()
    assert np.frombuffer(change.node.key, np.int32).tolist() == [1, 2, 60, 0]


def test_a_step_that_nobody_waits_for_tells_no_time():
    served, (prompt,) = engine(policy=POLICIES["mlfq"]()), prompts(1)
    run(served, [prompt], GREEDY)  # compiled
    told = []
    served.scheduler.took = lambda plan, seconds: told.append(seconds)
    served.add(prompt, GREEDY, request_id="a")
    served.step()
    served.abort("a")
    time.sleep(0.5)  # idle
    run(served, [prompt], GREEDY)
    assert len(told) == GREEDY.max_tokens and max(told) < 0.4


def test_programs_are_compiled_beside_a_step():
    served, (prompt,) = engine(), prompts(1)
    (whole,) = all_tokens(run(served, [prompt], GREEDY))
    served.add(prompt, GREEDY, request_id="a")
    deltas = [*served.step(), *served.step()]
    served.warm_up()
    while served.unfinished:
        deltas += served.step()
    assert tokens([delta for _, delta in deltas]) == whole
