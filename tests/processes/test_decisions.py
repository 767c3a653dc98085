"""Decisions of one process, and what crosses processes; tests/training has those of several."""

import jax
import pytest

from fusedkv_jax import processes
from fusedkv_jax.processes import decisions
from fusedkv_jax.training import DamagedCheckpointError


def test_one_process_decides_alone():
    assert processes.decide(3, lambda values: [2 * value for value in values]) == [6]
    assert processes.on_first(lambda: "first") == "first" and processes.is_first()
    assert processes.together(lambda: "done") == "done"
    with pytest.raises(KeyError):
        processes.together(lambda: {}["missing"])


def test_values_and_errors_cross_processes():
    value = [None, 3, "text", {"a": [1.5, True]}]
    assert decisions._decode(decisions._encode(value)) == value

    class Local(Exception):
        pass

    damage = DamagedCheckpointError("checkpoint 7 is damaged")
    for error in (ValueError("a"), OSError(28, "no space"), damage):
        _, found = decisions._decode(decisions._encode((1, error)))
        assert type(found) is type(error) and str(found) == str(error)
    decoding = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")  # of five arguments
    for error in (jax.errors.JaxRuntimeError("b"), Local("c"), decoding):
        _, found = decisions._decode(decisions._encode((1, error)))
        assert type(found) is RuntimeError
        assert str(found) == f"{type(error).__name__}: {error}"
    with pytest.raises(TypeError, match="plain values, not set"):
        decisions._encode({1, 2})


def test_text_of_another_process_makes_nothing_but_errors():
    for module, name in (("os", "system"), ("builtins", "eval"), ("subprocess", "Popen")):
        found = decisions._decode(f'{{"__error__": ["{module}", "{name}", "true"]}}')
        assert type(found) is RuntimeError


def test_the_first_process_that_fails_is_the_one_that_counts():
    failures = [None, ValueError("one"), OSError("two")]
    found = decisions._first_failure(failures)
    assert found is not None and found[0] == 1 and str(found[1]) == "one"
    assert decisions._first_failure([None, None]) is None
