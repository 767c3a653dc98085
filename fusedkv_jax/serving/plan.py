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
    """

    requests: list[Request] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    calm: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(self.counts)

    def sampled(self) -> list[bool]:
        """Whose last known token is computed, so that the next one is drawn.

        The layers that cache nothing run for these only, and for one token of each.
        """
        return [
            request.computed + count == request.length
            for request, count in zip(self.requests, self.counts, strict=True)
        ]
