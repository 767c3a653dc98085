"""What a configuration costs: parameters, cache bytes, bytes read per token and FLOPs.

All of it is derived from the configuration's layout and shapes; no array is allocated.
"""

from typing import TYPE_CHECKING

from fusedkv_jax.lazy import lazy_names

__all__ = [
    "StepCosts",
    "StepWork",
    "cache_bytes",
    "cache_bytes_per_token",
    "decode_cache_reads",
    "decode_flops",
    "parameter_breakdown",
    "parameter_count",
    "prefill_flops",
    "summary",
    "train_flops_per_token",
]

if TYPE_CHECKING:
    from fusedkv_jax.costs.cache import (
        cache_bytes,
        cache_bytes_per_token,
        decode_cache_reads,
    )
    from fusedkv_jax.costs.flops import decode_flops, prefill_flops, train_flops_per_token
    from fusedkv_jax.costs.parameters import parameter_breakdown, parameter_count
    from fusedkv_jax.costs.report import summary
    from fusedkv_jax.costs.step import StepCosts, StepWork
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        __all__,
        {
            "cache": ["cache_bytes", "cache_bytes_per_token", "decode_cache_reads"],
            "flops": ["decode_flops", "prefill_flops", "train_flops_per_token"],
            "parameters": ["parameter_breakdown", "parameter_count"],
            "report": ["summary"],
            "step": ["StepCosts", "StepWork"],
        },
    )
