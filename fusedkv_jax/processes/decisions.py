"""How processes decide together: one chooses for all, and an error of one is an error of all."""

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax._src import distributed  # private: the key-value store that all processes share

from fusedkv_jax.processes.cluster import ProcessesError

# A backstop only: where a process dies, the heartbeats end the others long before.
DECISION_SECONDS = 24 * 3600

T = TypeVar("T")
V = TypeVar("V")
_rounds: Counter[str] = Counter()


def is_first() -> bool:
    """Whether this process is the one that prints, logs and commits."""
    return jax.process_index() == 0


def decide(value: V, choose: Callable[[list[V]], T], channel: str = "main") -> T:
    """Every process gives a value; process 0 chooses; all return what it chose, or raise its error.

    All processes must call it, in the same order within a channel. No device takes part, so any
    thread may, each with a channel of its own.

    Args:
      value: this process's value: plain values that JSON can hold, and errors.
      choose: called on process 0 alone with the values of all, in the order of the processes.
      channel: a name for this sequence of decisions.

    Returns:
      What `choose` returned, plain too; several processes see tuples as lists.
    """
    if jax.process_count() == 1:
        return choose([value])
    client = distributed.global_state.client
    assert client is not None
    place, timeout = f"fusedkv/{channel}/{_rounds[channel]}", DECISION_SECONDS * 1000
    _rounds[channel] += 1
    client.key_value_set(f"{place}/{jax.process_index()}", _encode(value))
    if not is_first():
        answer = client.blocking_key_value_get(f"{place}/answer", timeout)
        chosen, error = _decode(answer)
        if error is not None:
            raise error
        return chosen
    values = [
        _decode(client.blocking_key_value_get(f"{place}/{process}", timeout))
        for process in range(jax.process_count())
    ]
    # All have read the answer of the round before, or they would not be here.
    client.key_value_delete(f"fusedkv/{channel}/{_rounds[channel] - 2}/")
    try:
        chosen = choose(values)
    except Exception as error:
        client.key_value_set(f"{place}/answer", _encode((None, error)))
        raise
    client.key_value_set(f"{place}/answer", _encode((chosen, None)))
    return chosen


_ERROR = "__error__"


def _encode(value: object) -> str:
    """JSON; an error becomes its class and its text."""

    def plain(error: object) -> dict[str, list[str]]:
        if not isinstance(error, Exception):
            raise TypeError(f"processes exchange plain values, not {type(error).__name__}")
        return {_ERROR: [type(error).__module__, type(error).__name__, str(error)]}

    return json.dumps(value, default=plain)


def _decode(text: str) -> Any:
    return json.loads(text, object_hook=lambda found: _error(found.get(_ERROR)) or found)


def _error(description: list[str] | None) -> Exception | None:
    """An error of Python or of ours; any other is a RuntimeError that names it."""
    if description is None:
        return None
    module, name, message = description
    if module == "builtins" or module.startswith("fusedkv_jax."):
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            with contextlib.suppress(TypeError):  # one that is not made of a text alone
                return kind(message)
    return RuntimeError(f"{name}: {message}")


def on_first(function: Callable[[], T], channel: str = "main") -> T:
    """Call a function on process 0 alone; all return its result or raise its error."""
    return decide(None, lambda _: function(), channel)


def together(function: Callable[[], T], channel: str = "main") -> T:
    """Call a function on every process; if it fails on any, the first error is raised on all."""
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    first = decide(failure, _first_failure, channel)
    if first is not None:
        process, error = first
        raise failure if failure and process == jax.process_index() else error
    return result  # type: ignore[return-value]


def check_same(what: str, value: T, difference: Callable[[T, T], str | None]) -> None:
    """Refuse to go on where a process has another value than process 0.

    Args:
      what: the value's name in the message, such as "configuration".
      value: this process's.
      difference: of process 0's value and another one, in words; None where they agree.

    Raises:
      ProcessesError: on all processes; names the first one that differs, and how.
    """

    def compare(values: list[T]) -> None:
        for process, other in enumerate(values):
            found = difference(values[0], other)
            if found:
                raise ProcessesError(
                    f"process {process} has another {what} than process 0: {found}; start all "
                    "with the same command and files"
                )

    decide(value, compare)


def _first_failure(failures: list[Exception | None]) -> tuple[int, Exception] | None:
    return next(((i, error) for i, error in enumerate(failures) if error is not None), None)
