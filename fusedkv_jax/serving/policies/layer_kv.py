"""Prompts start when those who decode can wait for them (LayerKV, arXiv 2410.00428)."""

from __future__ import annotations

from fusedkv_jax.serving.policy import How, Policy, View
from fusedkv_jax.serving.request import Request


class LayerKVAdmission(Policy):
    """Admit a prompt only if the smallest slack of the requests that decode covers it.

    A request's slack is how long its next token may take so that its time per output token stays
    within the objective. The prompts that still compute use it up first. This is the
    idea of the paper's scheduler, with the past pace of each request for the predicted lengths
    of outputs; its layer-wise residency of caches is not here.

    Args:
        tpot: objective, seconds for each output token after the first.
        patience: seconds of waiting after which a prompt starts anyway, so that nobody starves.
    """

    def __init__(self, tpot: float = 0.1, patience: float = 10.0):
        for name, value in (("tpot", tpot), ("patience", patience)):
            if not value > 0:
                raise ValueError(f"{name}={value}; use seconds above 0")
        self.tpot, self.patience = tpot, patience

    def admits(self, request: Request, view: View) -> bool:
        if view.now - request.arrival > self.patience:
            return True
        slack, prompts = float("inf"), request.length - view.memory.matched(request)
        for other in view.running:
            if other.first_token is None:
                prompts += other.length - other.computed
            else:
                allowed = self.tpot * other.generated
                slack = min(slack, allowed - (view.now - other.first_token))
        return view.seconds_per_token * prompts <= slack

    def how(self, request: Request, view: View) -> How:
        return "swap"
