"""Prompts start in full memory while who decodes can wait for it (LayerKV, arXiv 2410.00428)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fusedkv_jax.serving.policy import How, Policy, View
from fusedkv_jax.serving.request import Request, State


class LayerKVAdmission(Policy):
    """No prompt waits for pages as long as requests that decode have time to spare.

    A request's slack is how long its next token may take so that its time per output token stays
    within the objective. Where pages are short, a prompt starts on those of the requests with the
    most slack, whose caches go to host memory; each comes back when its slack is used up. The
    paper moves layers of every request, and those go on with the rest; here all layers of some
    move, and these wait. The past pace of a request stands for its predicted length.

    Without host memory a prompt waits until pages are free.

    Args:
        tpot: objective, seconds for each output token after the first.
        spare: seconds of slack above which a request may be interrupted.
    """

    preemptive = True

    def __init__(self, tpot: float = 0.1, spare: float = 1.0):
        for name, value in (("tpot", tpot), ("spare", spare)):
            if not value > 0:
                raise ValueError(f"{name}={value}; use seconds above 0")
        self.tpot, self.spare = tpot, spare
        self._giving: list[Request] = []  # running ones who make room in this step

    def order(self, queue: Sequence[Request], view: View) -> Iterable[Request]:
        ranked = sorted(queue, key=lambda request: self._rank(request, view.now))
        head = next((each for each in ranked if each.state is not State.RUNNING), None)
        short, self._giving = 0 if head is None else view.memory.short(head), []
        for request in self.next_victims(view):
            if short <= 0:
                break
            self._giving.append(request)
            short -= len(request.pages)
        # Whoever is not needed runs beside the prompts; those who give way come last.
        return [each for each in ranked if each not in self._giving] + self._giving

    def admits(self, request: Request, view: View) -> bool:
        memory, short = view.memory, view.memory.short(request)
        if short <= 0:
            return True
        if memory.host is None or not memory.caching or self._slack(request, view.now) > 0:
            return False
        pages = sum(len(each.pages) for each in self._giving)  # none of those who gave way
        return short <= pages <= memory.host.available

    def next_victims(self, view: View) -> Iterable[Request]:
        slack = {request: self._slack(request, view.now) for request in view.running}
        able = (request for request in slack if slack[request] > self.spare)
        return sorted(able, key=slack.__getitem__, reverse=True)

    def victim(self, running: Sequence[Request], view: View) -> Request:
        return max(running, key=lambda request: (self._slack(request, view.now), request.arrival))

    def how(self, request: Request, view: View) -> How:
        return "swap"

    def _slack(self, request: Request, now: float) -> float:
        if request.first_token is None:
            return -float("inf")
        return self.tpot * request.generated - (now - request.first_token)

    def _rank(self, request: Request, now: float) -> tuple[int, float]:
        slack, decodes = self._slack(request, now), request.first_token is not None
        if request.state is State.RUNNING:
            return 0 if decodes else 1, request.arrival
        if decodes:
            return (2 if slack <= 0 else 4), slack
        return 3, request.arrival
