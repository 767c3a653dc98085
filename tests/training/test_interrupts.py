"""Signals become a flag; several processes learn of it some steps later, all at the same one."""

import signal

import pytest

from fusedkv_jax.training.interrupts import Interrupts, _Vote


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_next_one_acts(number):
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        assert interrupts.poll() is None
        signal.raise_signal(number)
        assert interrupts.agreed is None  # until the loop asks
        assert interrupts.poll() == interrupts.agreed == number.name
        assert signal.getsignal(number) is before


def test_a_vote_is_known_two_steps_later():
    vote = _Vote()  # over the devices of this process, as over those of several
    assert [vote.cast(number) for number in (0, 0, 15, 0, 2, 0, 0)] == [0, 0, 0, 0, 15, 0, 2]
