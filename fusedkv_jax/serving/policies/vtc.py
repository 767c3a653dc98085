"""Fair shares between clients by virtual token counters (VTC, arXiv 2401.00588)."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence

from fusedkv_jax.serving.policy import Policy, View
from fusedkv_jax.serving.request import Request

REMEMBERED = 4096  # clients whose counters are kept, beside those who have something to do


class VTC(Policy):
    """The client that was served least comes next.

    A client's counter grows by `input_weight` for each token of its prompts, when they are
    admitted, and by `output_weight` for each token generated. Who comes back after having had
    nothing to do starts at the least counter of those who wait. Between two clients who always
    have something waiting the counters differ by at most
    2 max(input_weight * longest prompt, output_weight * tokens that run at once) (theorem 4.4).

    Of clients with nothing to do, those are forgotten who would start there anyway; of more than
    `REMEMBERED` others those with the least counters, who come nearest to it.

    Args:
        input_weight: w_p.
        output_weight: w_q.
    """

    def __init__(self, input_weight: float = 1.0, output_weight: float = 2.0):
        self.input_weight, self.output_weight = input_weight, output_weight
        self.counters: dict[str, float] = defaultdict(float)
        self._queued: set[Request] = set()
        self._charged: set[Request] = set()  # whose prompts count already
        self._waiting: Counter[str] = Counter()  # how many of them each client has
        self._last = ""  # the client that left the queue last
        self._most = 2 * REMEMBERED  # counters at which some are forgotten

    def arrived(self, request: Request, view: View) -> None:
        client = request.client
        if client not in self._waiting:
            self.counters[client] = max(self.counters[client], self._floor())
        self._waiting[client] += 1
        self._queued.add(request)

    def order(self, queue: Sequence[Request], view: View) -> Iterable[Request]:
        if queue is not view.waiting:
            return queue
        return self._by_counters(queue)

    def _by_counters(self, queue: Sequence[Request]) -> Iterable[Request]:
        """Whoever is admitted raises its client's counter before the next one is chosen."""
        clients: dict[str, deque[Request]] = defaultdict(deque)
        for request in queue:
            clients[request.client].append(request)
        while clients:
            client = min(clients, key=lambda name: self.counters[name])
            yield clients[client].popleft()
            if not clients[client]:
                del clients[client]

    def admitted(self, request: Request, view: View) -> None:
        self._left(request)
        if not request.generated and request not in self._charged:  # not again after a preemption
            self._charged.add(request)
            self.counters[request.client] += self.input_weight * len(request.prompt)

    def progressed(self, request: Request, computed: int, generated: int, seconds: float) -> None:
        self.counters[request.client] += self.output_weight * generated

    def finished(self, request: Request, view: View) -> None:
        self._charged.discard(request)
        if request in self._queued:  # aborted
            self._left(request)
        if len(self.counters) >= self._most:
            self._forget({each.client for each in (*view.running, *self._charged)})
            self._most = 2 * max(REMEMBERED, len(self.counters))  # so that few ends pay for it

    def _floor(self) -> float:
        """The least counter of those who wait, or of who waited last; it never falls."""
        return min(self.counters[client] for client in self._waiting or (self._last,))

    def _forget(self, running: set[str]) -> None:
        busy, floor = running | self._waiting.keys() | {self._last}, self._floor()
        idle = [name for name, count in self.counters.items() if name not in busy and count > floor]
        idle.sort(key=lambda name: self.counters[name])
        kept = busy | {*idle[-REMEMBERED:]}
        self.counters = defaultdict(float, {n: c for n, c in self.counters.items() if n in kept})

    def _left(self, request: Request) -> None:
        self._queued.remove(request)
        self._waiting[request.client] -= 1
        if not self._waiting[request.client]:
            del self._waiting[request.client]  # there may be many clients who come once
        self._last = request.client
