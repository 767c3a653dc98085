"""Skip-join multi-level feedback queue (FastServe, arXiv 2305.05920)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fusedkv_jax.serving.policy import How, Policy, View
from fusedkv_jax.serving.request import Request


class MLFQ(Policy):
    """Short requests overtake long ones, without knowing how long they will be.

    A request enters at the first level whose quantum covers its prefill, goes down a level when
    it has used its quantum there, and up to the first when it has waited too long.

    Args:
        quantum: seconds of the first level; each further one has twice as many.
        levels: how many there are.
        starvation: seconds without a step after which a request goes to the first level.
    """

    preemptive = True

    def __init__(self, quantum: float = 0.5, levels: int = 8, starvation: float = 60.0):
        for name, value in (("quantum", quantum), ("levels", levels), ("starvation", starvation)):
            if not value > 0:
                raise ValueError(f"{name}={value}; use more than 0")
        self.quantum, self.levels, self.starvation = quantum, levels, starvation
        self._level: dict[Request, int] = {}
        self._used: dict[Request, float] = {}  # seconds at the present level
        self._served: dict[Request, float] = {}  # when it last had a step
        self._now = 0.0

    def arrived(self, request: Request, view: View) -> None:
        if request in self._level:
            return  # preempted: it keeps its level
        seconds = view.seconds_per_token * request.length
        level = 0
        while level < self.levels - 1 and self.quantum * 2**level < seconds:
            level += 1
        self._level[request], self._used[request] = level, 0.0
        self._served[request] = view.now

    def order(self, queue: Sequence[Request], view: View) -> Iterable[Request]:
        self._now = view.now
        for request in queue:
            if self._level[request] and view.now - self._served[request] > self.starvation:
                self._level[request], self._used[request] = 0, 0.0
                self._served[request] = view.now
        return sorted(queue, key=self._rank)

    def progressed(self, request: Request, computed: int, generated: int, seconds: float) -> None:
        self._used[request] += seconds
        self._served[request] = self._now + seconds
        if self._used[request] >= self.quantum * 2 ** self._level[request]:
            self._level[request] = min(self._level[request] + 1, self.levels - 1)
            self._used[request] = 0.0

    def victim(self, running: Sequence[Request], view: View) -> Request:
        return max(running, key=self._rank)

    def how(self, request: Request, view: View) -> How:
        return "swap"

    def finished(self, request: Request, view: View) -> None:
        for account in (self._level, self._used, self._served):
            account.pop(request, None)

    def _rank(self, request: Request) -> tuple[int, float]:
        return self._level[request], request.arrival
