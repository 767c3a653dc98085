"""First come, first served: what a policy is if it says nothing else."""

from __future__ import annotations

from fusedkv_jax.serving.policy import How, Policy, View
from fusedkv_jax.serving.request import Request


class FCFS(Policy):
    """First come, first served; the latest arrival gives up its pages, as in vLLM.

    Args:
        on_eviction: "recompute" or "swap".
        on_call: what becomes of the pages while a tool runs: "keep", "recompute" or "swap".
    """

    def __init__(self, on_eviction: How = "recompute", on_call: How = "keep"):
        if on_eviction == "keep":
            raise ValueError("on_eviction='keep' frees nothing; use 'recompute' or 'swap'")
        self.on_eviction: How = on_eviction
        self.on_call: How = on_call

    def how(self, request: Request, view: View) -> How:
        return self.on_call if request.calls_tool else self.on_eviction
