"""Groups of a common prefix together, decode-heavy groups first (BatchLLM, arXiv 2412.03594)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fusedkv_jax.serving.policy import Policy, View
from fusedkv_jax.serving.request import Request


class BatchLLM(Policy):
    """For batches that are known in advance: every shared prefix is computed once.

    The waiting prompts are sorted by their tokens, which puts those of a common prefix side by
    side at every depth, as a walk through the tree of all prompts would. Groups are the prompts
    of one first page; of these, the group with most tokens to generate for each one to compute
    comes first, so that decodes are at hand to fill later steps with. A running prefix stays in
    the cache as long as somebody reads it, and the next of its group follows at once.
    """

    def __init__(self) -> None:
        self._ranks: dict[Request, int] = {}

    def order(self, queue: Sequence[Request], view: View) -> Iterable[Request]:
        if queue is not view.waiting:
            return queue
        if any(request not in self._ranks for request in queue):
            self._rank(queue, view.memory.page_size)
        return sorted(queue, key=self._ranks.__getitem__)

    def finished(self, request: Request, view: View) -> None:
        self._ranks.pop(request, None)

    def _rank(self, queue: Sequence[Request], page_size: int) -> None:
        groups: dict[tuple[str, bytes], list[tuple[bytes, Request]]] = {}
        for request in queue:
            tokens = request.prompt.astype(">u4").tobytes()  # big-endian: bytes sort as numbers do
            groups.setdefault((request.salt, tokens[: 4 * page_size]), []).append((tokens, request))
        ordered = sorted(groups.values(), key=_decode_share, reverse=True)
        pairs = [pair for group in ordered for pair in sorted(group, key=lambda pair: pair[0])]
        self._ranks = {request: rank for rank, (_, request) in enumerate(pairs)}


def _decode_share(group: list[tuple[bytes, Request]]) -> float:
    """Tokens to generate for each token to compute, shared prefixes computed once."""
    prompts = sorted(tokens for tokens, _ in group)
    computed = len(prompts[0])
    for one, other in zip(prompts, prompts[1:], strict=False):
        computed += len(other) - _common(one, other)
    return sum(request.max_tokens for _, request in group) / max(computed // 4, 1)


def _common(one: bytes, other: bytes) -> int:
    """Length of the common beginning, by bisection."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
