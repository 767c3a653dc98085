"""Drafts are left out where they do not pay; times are made up."""

import types

import pytest

from fusedkv_jax.serving.draft_switch import DraftSwitch
from tests.serving.served import GREEDY, prompts, run
from tests.serving.test_speculation import engine, outputs, plain
from tests.serving.test_speculation import model as model_


def steps(switch, count, drafted, plain=(1.0, 4), requests=4, found=True):
    """The choices of so many steps, which take these (seconds, tokens)."""
    choices = []
    for number in range(count):
        choices.append(switch.drafts(requests))
        checks = choices[-1] and (found is True or found(number))
        switch.took(requests, checks, *(drafted if checks else plain))
    return choices


def test_the_faster_way_is_taken_but_for_few_trials():
    slower = steps(DraftSwitch((1, 4)), 1000, drafted=(3.0, 8))
    assert all(slower[:16]) and not any(slower[16:36]) and sum(slower[36:]) == 4 * 5
    faster = steps(DraftSwitch((1, 4)), 1000, drafted=(1.5, 8))
    assert all(faster[:16]) and not any(faster[16:20]) and faster[20:].count(False) == 4 * 4


def test_what_changes_is_found_out():
    switch = DraftSwitch((4,))
    assert sum(steps(switch, 2000, drafted=(3.0, 8))) < 60
    choices = steps(switch, 1500, drafted=(1.5, 16))
    assert sum(choices[-500:]) > 450
    assert sum(steps(switch, 1500, drafted=(1.5, 4))[-800:]) < 50


@pytest.mark.parametrize("pace, pays", [((3.0, 8), False), ((1.5, 8), True)])
def test_a_step_that_compiles_decides_nothing(pace, pays):
    for first in ((1000.0, 4), None):
        switch = DraftSwitch((4,))
        if first:
            switch.took(4, True, *first)
        assert steps(switch, 60, pace)[20:34] == [pays] * 14
        steps(switch, 1, pace, plain=(1000.0, 4))  # nor does one that is held up
        found = sum(steps(switch, 300, pace))
        assert found > 250 if pays else found < 50


def test_each_size_is_judged_by_itself():
    switch = DraftSwitch((1, 2, 8))
    for _ in range(4):
        assert sum(steps(switch, 50, (1.5, 2), (1.0, 1), requests=1)[20:]) > 20
        assert sum(steps(switch, 50, (4.0, 10), (1.0, 5), requests=5)[20:]) < 12
    assert switch.drafts(1) and not switch.drafts(8)


def test_steps_in_which_nothing_is_found_are_plain_ones():
    """The lookup goes on, and is judged by the steps that have drafts."""
    choices = steps(DraftSwitch((4,)), 1000, (1.5, 8), found=lambda number: number % 50 == 0)
    assert choices.count(False) <= 4
    assert all(steps(DraftSwitch((4,)), 1000, (9.0, 8), found=lambda number: False))


def test_an_engine_stops_to_draft_and_answers_as_ever(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(
        "fusedkv_jax.serving.engine.time", types.SimpleNamespace(monotonic=lambda: clock.now)
    )
    given = [prompt[:9] * 2 for prompt in prompts(60)]
    found, shares = [], []
    for seconds in (0.1, 10.0):  # of a step with drafts; any other takes one
        served = engine(num_pages=60)
        compute = served.runner.start

        def timed(plan, draws, compute=compute, seconds=seconds):
            clock.now += seconds if plan.drafts else 1.0
            return compute(plan, draws)

        monkeypatch.setattr(served.runner, "start", timed)
        found.append(outputs(run(served, given, GREEDY)))
        stats = served.stats()
        assert stats.accepted_tokens > 0 and stats.undrafted_steps > 0
        shares.append(stats.undrafted_steps / stats.steps)
    assert found[0] == found[1] == outputs(run(plain(model_()), given, GREEDY))
    assert shares[0] < 0.2 and shares[1] > 2 * shares[0], shares
