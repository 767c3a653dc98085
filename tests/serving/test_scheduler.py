"""Schedulers of every policy, under load, against an account of what is in the pages."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedkv_jax.serving import (
    POLICIES,
    Direction,
    NeverFits,
    PagedMemory,
    Policy,
    Request,
    Scheduler,
    State,
    StepPlan,
    ToolCall,
    View,
)
from fusedkv_jax.serving.policies import vtc
from fusedkv_jax.serving.simulate import simulate
from tests.serving.contents import Contents, check_accounts, tokens_of


def _request(rng: random.Random, number: int, tools: bool = True) -> Request:
    prefix = rng.choice(([1] * 9, [1] * 4 + [2] * 5, []))
    prompt = prefix + [rng.randint(3, 5) for _ in range(rng.randint(1, 14))]
    calls, max_tokens = (), rng.randint(1, 12)
    if tools and max_tokens > 3 and rng.random() < 0.4:
        calls = (ToolCall(rng.randint(1, 3), rng.random() * 8, (7,) * rng.randint(0, 5)),)
    return Request(
        str(number),
        np.array(prompt),
        max_tokens=max_tokens,
        arrival=float(number),
        client=rng.choice("ab"),
        priority=rng.randint(0, 2),
        salt=rng.choice(("", "", "x")),
        tool_calls=calls,
    )


def _drawn(request: Request) -> int:
    return _follows(tokens_of(request))


def _follows(tokens: list[int]) -> int:
    """A token that follows from those before it, as a greedy model's does."""
    return 100 + hash(tuple(tokens)) % 50


def _draft(plan: StepPlan, rng: random.Random) -> None:
    """Guess some tokens where there is room: right ones, at times with wrong ones behind."""
    drafts = []
    for request, room in zip(plan.requests, plan.room, strict=True):
        tokens, guessed = tokens_of(request), []
        for _ in range(rng.randint(0, room)):
            guessed.append(_follows([*tokens, *guessed]) if rng.random() < 0.8 else 99)
        drafts.append(guessed)
    plan.draft(drafts)


def _accept(plan: StepPlan) -> None:
    for place, (request, guessed) in enumerate(zip(plan.requests, plan.drafts, strict=True)):
        right: list[int] = []
        for token in guessed:
            if token != _follows([*tokens_of(request), *right]):
                break
            right.append(token)
        plan.accept(place, right)


def _serve(scheduler: Scheduler, requests: list[Request], rng: random.Random, checked=True):
    contents, coming, now = Contents(scheduler), list(requests), 0.0
    live: list[Request] = []
    for _ in range(3000):
        while coming and (coming[0].arrival <= now or not scheduler.unfinished):
            live.append(coming.pop(0))
            scheduler.add(live[-1], now)
        if live and rng.random() < 0.01:
            aborted = rng.choice(live)
            if aborted.state is not State.FINISHED:
                scheduler.abort(aborted, now)
                aborted.max_tokens = aborted.generated
        plan = scheduler.schedule(now)
        if any(plan.room):
            _draft(plan, rng)
        assert len(set(plan.requests)) == len(plan.requests) <= scheduler.max_num_seqs
        assert plan.tokens <= scheduler.max_num_batched_tokens
        assert plan.requests or not plan.copies, "nobody carries them out"
        contents.run(plan)
        now += 1.0
        if plan.drafts:
            _accept(plan)
        tokens = [
            _drawn(request) if sampled else None
            for request, sampled in zip(plan.requests, plan.sampled(), strict=True)
        ]
        scheduler.finish(plan, tokens, now, 1.0)
        if checked:
            check_accounts(scheduler)
            contents.check_changes()
        if not coming and not scheduler.unfinished:
            break
    assert not scheduler.unfinished and not coming, "some never ended"
    assert all(r.state is State.FINISHED and r.generated == r.max_tokens for r in requests)
    memory = scheduler.memory
    assert memory.available == memory.pool.num_pages


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_policy_serves_everything_from_right_pages(name, seed):
    rng = random.Random(seed)
    memory = PagedMemory(
        rng.choice((14, 20, 60)),
        4,
        host_pages=rng.choice((0, 6, 40)),
        prefix_caching=rng.random() < 0.8,
        reserve=rng.choice((0.0, 0.1)),
    )
    scheduler = Scheduler(
        memory,
        POLICIES[name](),
        max_num_seqs=rng.choice((1, 3, 8)),
        max_num_batched_tokens=rng.choice((8, 11, 64)),
        look_ahead=rng.choice((0, 4)),
        draft_tokens=rng.choice((0, 3, 6)),
    )
    _serve(scheduler, [_request(rng, number) for number in range(16)], rng)


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_policy_serves_whole_prompts_from_slots(name, seed):
    """A page holds all of a request, and steps little more than one prompt."""
    rng = random.Random(seed)
    slots, longest = rng.choice((1, 2, 4)), 50
    scheduler = Scheduler(
        PagedMemory(slots, longest, prefix_caching=False, reserve=0),
        POLICIES[name](),
        max_num_seqs=slots + rng.choice((0, 2)),
        max_num_batched_tokens=rng.choice((24 + slots + 2, longest)),
        whole_prompts=True,
    )
    _serve(scheduler, [_request(rng, number) for number in range(16)], rng)


@pytest.mark.parametrize("swap", [False, True])
def test_a_small_pool_serves_500_requests(swap):
    rng = random.Random(0)
    requests = [_request(rng, number, tools=False) for number in range(500)]
    for request in requests:
        request.arrival = 0.0
    most = max(-(-request.total // 4) for request in requests)
    memory = PagedMemory(most + 1, 4, host_pages=100 * swap)
    policy = POLICIES["fcfs"](on_eviction="swap" if swap else "recompute")
    scheduler = Scheduler(memory, policy, max_num_seqs=8, max_num_batched_tokens=16)
    free, outputs = random.Random(1), {}
    free.random = lambda: 1.0  # nothing is aborted
    _serve(scheduler, requests, free, checked=False)
    check_accounts(scheduler)
    for request in requests:
        outputs[request.name] = request.outputs
        tokens = request.prompt.tolist()
        for token in request.outputs:
            assert token == 100 + hash(tuple(tokens)) % 50
            tokens.append(token)
    assert scheduler.preemptions > 0


def test_forks_copy_on_write():
    memory = PagedMemory(20, 4)
    scheduler = Scheduler(memory, POLICIES["fcfs"](), max_num_seqs=4)
    contents = Contents(scheduler)
    parent = Request("a", np.arange(3, 13), max_tokens=6)
    scheduler.add(parent, 0.0)
    plan = scheduler.schedule(0.0)
    contents.run(plan)
    scheduler.finish(plan, [50], 0.0, 1.0)
    others = [Request(name, np.arange(3, 13), max_tokens=6) for name in "bcd"]
    for number, other in enumerate(others):
        scheduler.fork(parent, other, [60 + number], 0.0)
    used = memory.pool.num_pages - memory.available
    assert used == 3, "three pages of the prompt, shared by all"
    for step in range(5):
        plan = scheduler.schedule(0.0)
        contents.run(plan)
        check_accounts(scheduler)
        scheduler.finish(plan, [70 + 10 * i + step for i in range(4)], 0.0, 1.0)
    assert [other.outputs[0] for other in others] == [60, 61, 62]
    assert not scheduler.unfinished and memory.available == 20


def test_no_step_waits_for_the_host_tier():
    """Beside a request that decodes, pages of others come and go while steps run."""
    memory = PagedMemory(200, 4, host_pages=800, reserve=0.0)
    scheduler = Scheduler(memory, POLICIES["fcfs"]())
    contents, directions, cached = Contents(scheduler), set(), []
    scheduler.add(Request("decodes", np.full(5, 1), max_tokens=400), 0.0)
    for number in range(80):  # forty prompts of nine pages, and the same again
        request = Request(str(number), np.full(33, 10 + number % 40), max_tokens=1)
        scheduler.add(request, 0.0)
        while request.state is not State.FINISHED:
            plan = scheduler.schedule(0.0)
            contents.run(plan)
            directions |= {copy.direction for copy in plan.copies}
            scheduler.finish(plan, [9] * len(plan.requests), 0.0, 1.0)
            check_accounts(scheduler)
        cached.append(request.cached)
    assert directions == {Direction.AHEAD, Direction.BEHIND}
    assert cached == [0] * 40 + [32] * 40


def test_a_second_identical_prompt_computes_a_page_at_most():
    memory = PagedMemory(300, 16)
    scheduler = Scheduler(memory, POLICIES["fcfs"](), max_num_batched_tokens=4096)
    counts = []
    for name in "ab":
        request = Request(name, np.arange(2000) % 97, max_tokens=1)
        scheduler.add(request, 0.0)
        plan = scheduler.schedule(0.0)
        counts.append(plan.tokens)
        scheduler.finish(plan, [1], 0.0, 1.0)
    assert counts[0] == 2000 and counts[1] <= 16


def test_layer_kv_starts_a_prompt_in_full_memory_while_those_who_decode_can_wait_for_it():
    memory = PagedMemory(40, 4, host_pages=80, reserve=0.0)
    policy = POLICIES["layer_kv"](tpot=1.0, spare=5.0)
    scheduler, ran = Scheduler(memory, policy), []
    contents = Contents(scheduler)
    first = Request("a", np.full(141, 1), max_tokens=18)  # 36 pages, later 40
    second = Request("b", np.full(20, 2), max_tokens=3)
    scheduler.add(first, 0.0)
    while scheduler.unfinished:
        step = len(ran)
        if step == 4:
            scheduler.add(second, 0.4)
        plan = scheduler.schedule(0.1 * step)
        ran.append("".join(request.name for request in plan.requests))
        contents.run(plan)
        scheduler.finish(plan, [9] * len(plan.requests), 0.1 * step, 0.1)
        check_accounts(scheduler)
    # Each token takes 0.1 s and gives 1 s of slack: with the sixth there are more than 5.
    assert ran == ["a"] * 6 + ["b"] * 3 + ["a"] * 12
    assert scheduler.preemptions == 1


def test_what_layer_kv_will_interrupt_is_written_beside_the_steps():
    memory = PagedMemory(40, 4, host_pages=80, reserve=0.0)
    scheduler = Scheduler(memory, POLICIES["layer_kv"](tpot=1.0, spare=5.0))
    scheduler.add(Request("a", np.full(141, 1), max_tokens=18), 0.0)
    directions = []
    for step in range(10):
        if step == 8:
            scheduler.add(Request("b", np.full(20, 2), max_tokens=3), 0.8)
        plan = scheduler.schedule(0.1 * step)
        directions.append([copy.direction for copy in plan.copies])
        scheduler.finish(plan, [9] * len(plan.requests), 0.1 * step, 0.1)
    # 146 tokens are there at the sixth step, 148 when it is interrupted: 37 full pages.
    assert directions[6] == [Direction.BEHIND] * 36 and not sum(directions[:6], [])
    assert directions[7] + directions[8] == [Direction.OUT]


@pytest.mark.parametrize("memory", [PagedMemory(9, 4), PagedMemory(9, 4, host_pages=2)])
def test_layer_kv_interrupts_nobody_without_room_on_the_host(memory):
    scheduler = Scheduler(memory, POLICIES["layer_kv"](tpot=1.0, spare=1.0))
    first, second = (Request(n, np.full(20, i), max_tokens=16) for i, n in enumerate("ab"))
    for request in (first, second):
        scheduler.add(request, 0.0)
    while first.state is not State.FINISHED:
        plan = scheduler.schedule(0.0)
        assert second not in plan.requests
        scheduler.finish(plan, [9] * len(plan.requests), 0.0, 0.1)
    assert second in scheduler.schedule(0.0).requests and not scheduler.preemptions


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_layer_kv_with_time_to_spare_serves_everything_from_right_pages(seed):
    rng = random.Random(seed)
    memory = PagedMemory(rng.choice((14, 20)), 4, host_pages=rng.choice((6, 40)), reserve=0.0)
    policy = POLICIES["layer_kv"](tpot=rng.choice((2.0, 5.0)), spare=rng.choice((0.5, 4.0)))
    scheduler = Scheduler(memory, policy, max_num_batched_tokens=rng.choice((300, 1000)))
    _serve(scheduler, [_request(rng, number) for number in range(16)], rng)


def test_a_step_in_which_nobody_runs_loses_no_copies():
    """There is one where the last request is aborted, and nobody carries its plan out."""
    scheduler = Scheduler(PagedMemory(16, 4, host_pages=64, reserve=0), POLICIES["fcfs"]())
    contents = Contents(scheduler)
    for token, size in ((1, 33), (2, 60), (1, 33)):  # the second takes the pages of the first
        request = Request(f"{token}", np.full(size, token), max_tokens=1)
        scheduler.add(request, 0.0)
        plan = scheduler.schedule(0.0)
        contents.run(plan)
        scheduler.finish(plan, [9], 0.0, 1.0)
        scheduler.schedule(0.0)
    assert request.cached == 32


def test_vtc_counts_a_prompt_once_that_loses_its_pages_before_it_ends():
    policy = POLICIES["vtc"]()
    scheduler = Scheduler(PagedMemory(16, 4), policy, max_num_seqs=8, max_num_batched_tokens=8)
    scheduler.add(Request("a", np.arange(20), max_tokens=1, client="c"), 0.0)
    for _ in range(2):
        scheduler.finish(scheduler.schedule(0.0), [None], 0.0, 1.0)
        scheduler.restart(0.0)
    assert policy.counters["c"] == 20.0


def test_vtc_looks_at_those_who_wait_alone():
    """There may be many clients who come once, and each arrival is compared with who waits."""
    policy = POLICIES["vtc"]()
    scheduler = Scheduler(PagedMemory(16, 4), policy)
    for number in range(5):
        scheduler.add(Request("a", np.arange(4), max_tokens=1, client=f"{number}"), 0.0)
        scheduler.finish(scheduler.schedule(0.0), [1], 0.0, 1.0)
    assert not policy._waiting


def _counters_of_those_who_return(policy: Policy) -> list[float]:
    """Three clients come back again and again, beside hundreds who come once."""
    scheduler, found = Scheduler(PagedMemory(256, 4), policy, max_num_batched_tokens=900), []
    for number in range(400):
        sizes = {f"once {number}": 1}
        if number % 50 == 49:
            sizes = {f"back {number % 3}": 600 if number < 300 else 1, **sizes}
        for client, size in sizes.items():
            scheduler.add(Request(client, np.arange(size), max_tokens=1, client=client), 0.0)
        found += [policy.counters[client] for client in sizes]
        plan = scheduler.schedule(0.0)
        scheduler.finish(plan, [1] * len(plan.requests), 0.0, 1.0)
    return found


def test_vtc_forgets_clients_who_would_begin_at_the_floor(monkeypatch):
    remembers = POLICIES["vtc"]()
    wanted = _counters_of_those_who_return(remembers)
    monkeypatch.setattr(vtc, "REMEMBERED", 8)
    forgets = POLICIES["vtc"]()
    assert _counters_of_those_who_return(forgets) == wanted
    assert len(forgets.counters) <= 16 < 300 < len(remembers.counters)
    monkeypatch.setattr(vtc, "REMEMBERED", 1)  # fewer than are above it
    assert _counters_of_those_who_return(POLICIES["vtc"]()) != wanted


def test_vtc_forgets_the_least_of_those_above_the_floor(monkeypatch):
    """The floor stays where it is while somebody waits who has had least."""
    monkeypatch.setattr(vtc, "REMEMBERED", 8)
    policy, view = POLICIES["vtc"](), View(PagedMemory(16, 4), [], [])
    policy.arrived(Request("waits", np.arange(4), max_tokens=1, client="waits"), view)
    for number in range(100):
        request = Request("a", np.arange(900 - number), max_tokens=1, client=f"{number}")
        for happens in (policy.arrived, policy.admitted, policy.finished):
            happens(request, view)
    assert policy.counters["0"] == 900 and len(policy.counters) <= 16


def test_who_gives_up_pages_holds_up_nobody_that_runs_behind_it():
    scheduler = Scheduler(PagedMemory(8, 4, reserve=0.0), POLICIES["shortest"]())
    sizes = {"a": (11, 6), "b": (12, 9), "c": (4, 3)}  # the second has most left to generate
    requests = {name: Request(name, np.full(n, n), max_tokens=m) for name, (n, m) in sizes.items()}
    ran = []
    for names in ("ab", "c", ""):
        for name in names:
            scheduler.add(requests[name], 0.0)
        plan = scheduler.schedule(0.0)
        ran.append("".join(request.name for request in plan.requests))
        scheduler.finish(plan, [9] * len(plan.requests), 0.0, 1.0)
    assert ran == ["ab", "abc", "ac"] and scheduler.preemptions == 1


def test_salts_share_nothing():
    memory = PagedMemory(100, 4)
    scheduler = Scheduler(memory, POLICIES["fcfs"]())
    for salt, computed in (("one", 17), ("two", 17), ("one", 1)):
        request = Request(salt, np.arange(17), max_tokens=1, salt=salt)
        scheduler.add(request, 0.0)
        plan = scheduler.schedule(0.0)
        assert plan.tokens == computed
        scheduler.finish(plan, [1], 0.0, 1.0)


def test_what_never_fits_is_refused_with_the_limit():
    scheduler = Scheduler(PagedMemory(10, 4, reserve=0), POLICIES["fcfs"](), max_model_len=64)
    with pytest.raises(NeverFits, match="come to 41 tokens, the cache holds 10 pages of 4"):
        scheduler.add(Request("a", np.arange(31), max_tokens=10), 0.0)
    with pytest.raises(NeverFits, match="context holds 64"):
        scheduler.add(Request("a", np.arange(60), max_tokens=10), 0.0)
    scheduler.add(Request("a", np.arange(30), max_tokens=10), 0.0)


def test_what_a_policy_of_ones_own_must_not_give_is_one_line():
    class Stranger(Policy):
        def victim(self, running, view):
            return Request("stranger", np.arange(4), max_tokens=1)

    class Forgets(Policy):
        def how(self, request, view):
            return "forget"

    class Nobody(Policy):
        def admits(self, request, view):
            return False

    for policy, message in (
        (Stranger(), "Stranger.victim gave 'stranger'; return one of the requests it is given"),
        (Forgets(), "Forgets.how gave 'forget'; return recompute, swap, keep"),
        (Nobody(), "2 requests wait, and Nobody lets none of them run"),
    ):
        scheduler = Scheduler(PagedMemory(4, 4, reserve=0), policy)
        both = [Request(name, np.arange(6), max_tokens=8) for name in "ab"]
        with pytest.raises(ValueError, match=message) as refused:
            simulate(both, scheduler, lambda plan: 1.0)
        assert "\n" not in str(refused.value)


def test_bad_settings_are_one_line():
    with pytest.raises(ValueError, match="max_num_batched_tokens=8 is below max_num_seqs=16"):
        Scheduler(PagedMemory(4, 4), POLICIES["fcfs"](), max_num_seqs=16, max_num_batched_tokens=8)
    with pytest.raises(ValueError, match="empty prompt"):
        Request("a", np.arange(0), max_tokens=1)
