"""Several processes that run one program, each on its own devices (jax.distributed).

A program of one process needs nothing from here: `initialize` does nothing, and the decisions are
plain calls.
"""

from typing import TYPE_CHECKING

from fusedkv_jax.lazy import lazy_names

__all__ = [
    "CONNECT_SECONDS",
    "ProcessesError",
    "check_same",
    "decide",
    "environment",
    "initialize",
    "is_first",
    "on_first",
    "together",
]

CONNECT_SECONDS = 300

if TYPE_CHECKING:
    from fusedkv_jax.processes.cluster import ProcessesError, initialize
    from fusedkv_jax.processes.decisions import check_same, decide, is_first, on_first, together
    from fusedkv_jax.processes.machine import environment
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        __all__,
        {
            "cluster": ["ProcessesError", "initialize"],
            "decisions": ["check_same", "decide", "is_first", "on_first", "together"],
            "machine": ["environment"],
        },
    )
