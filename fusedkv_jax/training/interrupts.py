"""SIGTERM and SIGINT become a flag that the loop reads between steps."""

import signal
import threading
from types import FrameType

INTERRUPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


class Interrupts:
    """Context manager that notes the first SIGTERM or SIGINT and lets a second one act.

    Schedulers (Slurm, Kubernetes, spot instances) send SIGTERM some time before the kill, and
    people press Ctrl-C: the run then saves and exits. Orbax's own preemption flag stays False
    without `jax.distributed`, so a run on one host needs this.

    Attributes:
      received: name of the signal, or None.
    """

    def __init__(self):
        self.received: str | None = None
        self._previous = {}

    def __enter__(self) -> "Interrupts":
        # Python allows handlers in the main thread only; elsewhere the host program's rule holds.
        in_main_thread = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGINT) if in_main_thread else ():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc_info) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
