"""Priorities with ageing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fusedkv_jax.serving.policy import Policy, View
from fusedkv_jax.serving.request import Request


class Priority(Policy):
    """The smallest `priority` first, as in vLLM; running requests give way.

    Args:
        tau: seconds of waiting that are worth one step of priority, so that nobody starves.
    """

    preemptive = True

    def __init__(self, tau: float = 60.0):
        if not tau > 0:
            raise ValueError(f"tau={tau}; use seconds above 0")
        self.tau = tau

    def _rank(self, request: Request) -> tuple[float, float]:
        # priority - age / tau, without what is common to all: the present.
        return request.priority + request.arrival / self.tau, request.arrival

    def order(self, queue: Sequence[Request], view: View) -> Iterable[Request]:
        return sorted(queue, key=self._rank)

    def victim(self, running: Sequence[Request], view: View) -> Request:
        return max(running, key=self._rank)
