"""Signals and clocks become flags that the loop reads between steps, alike on all processes."""

import collections
import signal
import threading
import time
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

INTERRUPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
# Steps until the processes act on a signal. The vote of a step is on the device behind that step,
# so reading it at once would wait for the step.
_DELAY = 2


class Interrupts:
    """Context manager that notes the first SIGTERM, SIGINT or SIGHUP.

    Schedulers (Slurm, Kubernetes, spot instances) send SIGTERM some time before the kill, people
    press Ctrl-C, and a terminal or connection that closes sends SIGHUP: the run then saves and
    exits. A second SIGTERM or SIGINT acts as ever. A second SIGHUP does not, because a shell and
    the kernel each send one; where it is ignored (nohup) it stays so. With several processes the
    signal may come to one alone or to each at another step; `poll` makes them stop at the same one.

    Attributes:
      received: name of the signal that this process got, or None.
      agreed: name of the signal that all processes know of since the last `poll`, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.agreed: str | None = None
        self._previous = {}
        self._vote = _Vote() if jax.process_count() > 1 else None

    def poll(self) -> str | None:
        """`agreed`, brought up to date; every process calls it once after each step."""
        if self._vote is None:
            self.agreed = self.received
        else:
            number = signal.Signals[self.received] if self.received else 0
            highest = self._vote.cast(int(number))
            self.agreed = signal.Signals(highest).name if highest else None
        return self.agreed

    def __enter__(self) -> "Interrupts":
        # Python allows handlers in the main thread only; elsewhere the host program's rule holds.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._restore(*self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        if number != signal.SIGHUP:
            self._restore(*self._previous.keys() & {signal.SIGTERM, signal.SIGINT})

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            signal.signal(number, self._previous.pop(number))


class Alarm:
    """Says once in so many seconds that it is time, at the same step on all processes.

    Process 0's clock decides; several processes learn of it some steps later.

    Args:
      seconds: between two times; 0 never says so.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._vote = _Vote() if seconds and jax.process_count() > 1 else None
        self.restart()

    def restart(self) -> None:
        """Count from now on; all processes call it at the same step."""
        self._since = time.monotonic()
        if self._vote is not None:
            self._vote.forget()  # or what was said until it was heard would ring again

    def poll(self) -> bool:
        """Whether it is time; every process calls it once after each step."""
        due = self._seconds > 0 and time.monotonic() - self._since >= self._seconds
        if self._vote is None:
            return due
        return bool(self._vote.cast(int(due and jax.process_index() == 0)))


class _Vote:
    """The maximum of a small number over all processes, some steps later, without waiting."""

    def __init__(self) -> None:
        mesh = Mesh(np.array(jax.devices()), ("device",))
        self._sharding = NamedSharding(mesh, P("device"))
        self._maximum = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self._ballots: dict[int, jax.Array] = {}
        self._cast: collections.deque[jax.Array] = collections.deque()

    def cast(self, number: int) -> int:
        """Vote; the outcome of the vote `_DELAY` calls ago, 0 before there is one."""
        if number not in self._ballots:  # made once: a step only starts the sum
            local = np.full(jax.local_device_count(), number, np.int32)
            self._ballots[number] = jax.make_array_from_process_local_data(self._sharding, local)
        self._cast.append(self._maximum(self._ballots[number]))
        return int(self._cast.popleft()) if len(self._cast) > _DELAY else 0

    def forget(self) -> None:
        """Drop the votes whose outcome is not known yet."""
        self._cast.clear()
