"""Every cost of one configuration in one dictionary, with what it saves against MHA."""

from __future__ import annotations

from jax.typing import DTypeLike

from fusedkv_jax import layouts
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.costs.arguments import check
from fusedkv_jax.costs.cache import (
    cache_bytes,
    cache_bytes_per_token,
    decode_cache_reads,
    multi_head_bytes,
)
from fusedkv_jax.costs.flops import decode_flops, prefill_flops, train_flops_per_token
from fusedkv_jax.costs.parameters import parameter_count


def summary(config: ModelConfig, length: int, dtype: DTypeLike = "bfloat16") -> dict[str, object]:
    """Costs of one sequence of `length` tokens with a cache of `dtype`.

    Returns:
        Counts, bytes and FLOPs under the names of this package's functions, and
        `parameters_removed` against the same model in which every layer has its own keys and
        values; `cache_ratio` against multi-head attention with as many query heads;
        `prefill_depth` in layers.

    Raises:
        ValueError: length below 1, or an unknown dtype.
    """
    check(config, length=length)
    ordinary = config.replace(layout=layouts.ordinary(config.num_layers))
    cache = cache_bytes(config, 1, length, dtype)
    return {
        "parameters": parameter_count(config),
        "parameters_removed": parameter_count(ordinary) - parameter_count(config),
        "cache_bytes_per_token": cache_bytes_per_token(config, dtype),
        "cache_bytes": cache,
        "cache_ratio": cache / multi_head_bytes(config, length, dtype),
        "decode_cache_reads": decode_cache_reads(config, length, dtype),
        "prefill_depth": config.kv_layout.prefill_depth,
        "prefill_flops": prefill_flops(config, length),
        "decode_flops": decode_flops(config, length),
        "train_flops_per_token": train_flops_per_token(config, length),
    }
