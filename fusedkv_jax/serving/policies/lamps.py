"""Where pages are while a tool runs: the least predicted waste (LAMPS, arXiv 2410.18248)."""

from __future__ import annotations

from fusedkv_jax.serving.policy import How, Policy, View
from fusedkv_jax.serving.request import Request


class LAMPS(Policy):
    """Keep, drop or swap, whichever wastes the fewest page-seconds of memory.

    With C tokens of context in P pages, and Q pages in use by all running requests:
    keeping wastes P times the length of the call; dropping, the time of computing C again, in
    which everybody waits, times (P + Q); swapping, twice the time of the copies times (P + Q).

    Args:
        optimism: factor on the predicted length of calls; 1 where predictions are right.
    """

    def __init__(self, optimism: float = 1.0):
        self.optimism = optimism

    def how(self, request: Request, view: View) -> How:
        if not request.calls_tool:
            return "swap"
        pages = len(request.pages)
        everyone = view.memory.pool.num_pages - view.memory.available
        keeping = pages * self.optimism * request.tool_calls[0].seconds
        dropping = view.seconds_per_token * request.computed * (pages + everyone)
        swapping = 2 * view.seconds_per_page * pages * (pages + everyone)
        if view.memory.host is None or view.memory.host.available < pages:
            swapping = float("inf")
        waste: dict[How, float] = {"keep": keeping, "recompute": dropping, "swap": swapping}
        return min(waste, key=waste.__getitem__)
