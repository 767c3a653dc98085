"""Longest prefix match first (RadixAttention, arXiv 2312.07104)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fusedkv_jax.serving.policy import Policy, View
from fusedkv_jax.serving.request import Request


class LPM(Policy):
    """Of the waiting requests, those first of which most is in the prefix cache.

    The paper shows that this order has the best hit rate of all for a batch that is known in
    advance. As SGLang does, it falls back to arrival where the queue is long.

    Args:
        longest_queue: waiting requests up to which prefixes are compared.
    """

    def __init__(self, longest_queue: int = 128):
        self.longest_queue = longest_queue

    def order(self, queue: Sequence[Request], view: View) -> Iterable[Request]:
        if queue is not view.waiting or not 1 < len(queue) <= self.longest_queue:
            return queue
        return sorted(queue, key=lambda request: -view.memory.matched(request))
