"""Signals become a flag; several processes learn of it some steps later, all at the same one."""

import signal

import pytest

from fusedkv_jax.training.interrupts import Alarm, Interrupts, _Vote


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_next_one_acts(number):
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        assert interrupts.poll() is None
        signal.raise_signal(number)
        assert interrupts.agreed is None  # until the loop asks
        assert interrupts.poll() == interrupts.agreed == number.name
        assert signal.getsignal(number) is before


def test_a_closing_terminal_is_noted_however_often_it_says_so():
    before = signal.getsignal(signal.SIGTERM)
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with Interrupts() as interrupts:
            for _ in range(3):
                signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)  # the first of these; a second one would act
            assert interrupts.poll() == "SIGHUP"
            assert signal.getsignal(signal.SIGTERM) is before
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, outside)


def test_under_nohup_a_closing_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert interrupts.poll() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_alarm_rings_when_its_time_is_over_and_again(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    alarm, never, rung = Alarm(60), Alarm(0), []
    for now[0] in (59, 61, 62, 119, 125):
        rung.append(alarm.poll())
        assert not never.poll()
        if rung[-1]:
            alarm.restart()
    assert rung == [False, True, False, False, True]


def test_an_alarm_of_several_processes_rings_once(monkeypatch):
    """The votes that were cast until its time was known do not ring again."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    alarm, rung = Alarm(60), []
    alarm._vote = _Vote()
    for now[0] in (59, 61, 62, 63, 64, 65, 66, 122, 124, 125, 126):
        rung.append(alarm.poll())
        if rung[-1]:
            alarm.restart()
    assert rung == [False] * 3 + [True] + [False] * 6 + [True]


def test_a_vote_is_known_two_steps_later():
    vote = _Vote()  # over the devices of this process, as over those of several
    assert [vote.cast(number) for number in (0, 0, 15, 0, 2, 0, 0)] == [0, 0, 0, 0, 15, 0, 2]
