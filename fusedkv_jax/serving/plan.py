"""What one step of the engine computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusedkv_jax.serving.copies import Copy
from fusedkv_jax.serving.request import Request


@dataclass
class StepPlan:
    """Tokens of requests that pass through the model together.

    Attributes:
        requests: whose tokens.
        counts: how many of each, from its `computed` on: 1 where it decodes, a chunk of the
            prompt otherwise.
        copies: pages to copy before, in order.
        calm: the first so many requests decode, and need nothing else: their `Request.calm` holds.
        room: how many tokens may be drafted for each request; empty unless all of them decode.
        drafts: the drafted tokens of each request, which pass behind its last known one; empty if
            nothing is drafted.
    """

    requests: list[Request] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    calm: int = 0
    room: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(self.counts)

    def sampled(self) -> list[bool]:
        """Whose last known token is computed, so that the next one is drawn.

        The layers that cache nothing run for these only, and for one token of each and for those
        that are drafted.
        """
        return [
            request.computed + count >= request.length
            for request, count in zip(self.requests, self.counts, strict=True)
        ]

    def draft(self, drafts: list[list[int]]) -> None:
        """Let drafted tokens pass with the last known one of each request, as `room` allows."""
        self.drafts, self.counts, self.calm = drafts, [1 + len(own) for own in drafts], 0

    def accept(self, place: int, tokens: list[int]) -> None:
        """What was drafted for a request is known now as far as these tokens; the rest is void."""
        request = self.requests[place]
        request.outputs += tokens
        request.length += len(tokens)
        self.counts[place] = 1 + len(tokens)
