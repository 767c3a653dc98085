"""Serving: which requests run together and which pages they hold.

The scheduler, its policies and the memory know nothing of arrays: they plan steps over page
numbers. `simulate` runs them on a virtual clock.
"""

from fusedkv_jax.serving.memory import Copy, Direction, PagedMemory
from fusedkv_jax.serving.plan import StepPlan
from fusedkv_jax.serving.policies import POLICIES
from fusedkv_jax.serving.policy import Policy, View
from fusedkv_jax.serving.request import Request, State, ToolCall
from fusedkv_jax.serving.scheduler import NeverFits, Scheduler

__all__ = [
    "POLICIES",
    "Copy",
    "Direction",
    "NeverFits",
    "PagedMemory",
    "Policy",
    "Request",
    "Scheduler",
    "State",
    "StepPlan",
    "ToolCall",
    "View",
]
