"""Several processes that run one program, each on its own devices (jax.distributed).

A program of one process needs nothing from here: `initialize` does nothing, and the decisions are
plain calls.
"""

from fusedkv_jax.processes.cluster import CONNECT_SECONDS, ProcessesError, initialize
from fusedkv_jax.processes.decisions import check_same, decide, is_first, on_first, together

__all__ = [
    "CONNECT_SECONDS",
    "ProcessesError",
    "check_same",
    "decide",
    "initialize",
    "is_first",
    "on_first",
    "together",
]
