"""Shortest output first, known beforehand: what policies that must guess are measured against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fusedkv_jax.serving.policy import Policy, View
from fusedkv_jax.serving.request import Request


class Shortest(Policy):
    """Whoever has the fewest tokens left to generate comes next; nobody is interrupted for it.

    A simulated request generates all its `max_tokens`, so there this is an oracle. In an engine it
    goes by what clients allow, and a client that allows much may wait for ever.
    """

    def order(self, queue: Sequence[Request], view: View) -> Iterable[Request]:
        return sorted(queue, key=_left) if queue is view.waiting else queue

    def victim(self, running: Sequence[Request], view: View) -> Request:
        return max(running, key=_left)


def _left(request: Request) -> int:
    return request.max_tokens - request.generated
