"""Ahead-of-time compilation for TPU slices: what each device would hold, compute and send."""

from typing import TYPE_CHECKING

from fusedkv_jax.lazy import lazy_names

__all__ = ["programs", "report", "search", "text"]

if TYPE_CHECKING:
    from fusedkv_jax.compile_ahead import programs, report, search, text
else:
    __getattr__, __dir__ = lazy_names(__name__, __all__, {})
