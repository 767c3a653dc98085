"""Goodput: shares of a scripted clock."""

import pytest

from fusedkv_jax.training.monitoring.goodput import Goodput


def test_shares_of_a_scripted_run():
    times = iter([0.0, 2.0, 3.0, 7.0, 8.0, 10.0])
    goodput = Goodput("start", clock=lambda: next(times))
    goodput.switch("compilation")  # start took 2
    goodput.switch("steps")  # compilation took 1
    goodput.switch("saving")  # steps took 4
    goodput.switch("steps")  # saving took 1
    fractions = goodput.fractions()  # steps took 2 more, 6 of 10
    assert fractions == pytest.approx(
        {"steps": 0.6, "start": 0.2, "compilation": 0.1, "saving": 0.1}
    )
    assert list(fractions)[:2] == ["steps", "start"]


def test_summary_names_what_was_lost():
    times = iter([0.0, 1.0, 10.0])
    goodput = Goodput("compilation", clock=lambda: next(times))
    goodput.switch("steps")
    assert goodput.summary() == "goodput 90.0% of 10.0 s; lost to compilation 10.0%"
