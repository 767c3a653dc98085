"""Serving: which requests run together, which pages they hold, and the engine that runs them.

The scheduler, its policies and the memory know nothing of arrays: they plan steps over page
numbers. `Engine` runs the plans on a device, `simulate` on a virtual clock.
"""

from typing import TYPE_CHECKING

from fusedkv_jax.lazy import lazy_names

__all__ = [
    "LLM",
    "POLICIES",
    "AsyncEngine",
    "Copy",
    "OutputDelta",
    "Direction",
    "Engine",
    "EngineStats",
    "NGramSpeculation",
    "NeverFits",
    "PagedMemory",
    "Policy",
    "QueueFull",
    "Request",
    "RequestError",
    "Scheduler",
    "ServingSettings",
    "State",
    "StepPlan",
    "StepShapes",
    "OutputStream",
    "ToolCall",
    "View",
]

if TYPE_CHECKING:
    from fusedkv_jax.serving.copies import Copy, Direction
    from fusedkv_jax.serving.engine import Engine
    from fusedkv_jax.serving.front import AsyncEngine, OutputStream, QueueFull
    from fusedkv_jax.serving.llm import LLM
    from fusedkv_jax.serving.memory import PagedMemory
    from fusedkv_jax.serving.output import EngineStats, OutputDelta
    from fusedkv_jax.serving.plan import StepPlan
    from fusedkv_jax.serving.policies import POLICIES
    from fusedkv_jax.serving.policy import Policy, View
    from fusedkv_jax.serving.request import Request, RequestError, State, ToolCall
    from fusedkv_jax.serving.scheduler import NeverFits, Scheduler
    from fusedkv_jax.serving.settings import ServingSettings
    from fusedkv_jax.serving.shapes import StepShapes
    from fusedkv_jax.serving.speculation import NGramSpeculation
else:
    # The simulator needs no model: what runs one is imported at its first use.
    __getattr__, __dir__ = lazy_names(
        __name__,
        __all__,
        {
            "copies": ["Copy", "Direction"],
            "engine": ["Engine"],
            "front": ["AsyncEngine", "QueueFull", "OutputStream"],
            "llm": ["LLM"],
            "memory": ["PagedMemory"],
            "output": ["OutputDelta", "EngineStats"],
            "plan": ["StepPlan"],
            "policies": ["POLICIES"],
            "policy": ["Policy", "View"],
            "request": ["Request", "RequestError", "State", "ToolCall"],
            "scheduler": ["NeverFits", "Scheduler"],
            "settings": ["ServingSettings"],
            "shapes": ["StepShapes"],
            "speculation": ["NGramSpeculation"],
        },
    )
