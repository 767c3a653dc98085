"""Scheduling policies, one a file, and their names."""

from __future__ import annotations

from fusedkv_jax.serving.policies.batch_llm import BatchLLM
from fusedkv_jax.serving.policies.dfs_weight import DFSWeight
from fusedkv_jax.serving.policies.fcfs import FCFS
from fusedkv_jax.serving.policies.lamps import LAMPS
from fusedkv_jax.serving.policies.layer_kv import LayerKVAdmission
from fusedkv_jax.serving.policies.lpm import LPM
from fusedkv_jax.serving.policies.mlfq import MLFQ
from fusedkv_jax.serving.policies.priority import Priority
from fusedkv_jax.serving.policies.shortest import Shortest
from fusedkv_jax.serving.policies.vtc import VTC
from fusedkv_jax.serving.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "fcfs": FCFS,
    "priority": Priority,
    "lpm": LPM,
    "dfs_weight": DFSWeight,
    "batch_llm": BatchLLM,
    "mlfq": MLFQ,
    "vtc": VTC,
    "lamps": LAMPS,
    "layer_kv": LayerKVAdmission,
    "shortest": Shortest,
}

__all__ = ["POLICIES", *sorted(cls.__name__ for cls in POLICIES.values())]  # pyright: ignore
