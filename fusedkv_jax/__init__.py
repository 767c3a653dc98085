"""Decoder language models whose upper layers rebuild their KV cache from lower layers' caches."""

from fusedkv_jax import costs, layouts, presets
from fusedkv_jax.cache import KVCache
from fusedkv_jax.config import MLAConfig, ModelConfig, RopeConfig
from fusedkv_jax.generation import (
    Completion,
    SamplingParams,
    decode_step,
    generate,
    prefill,
    warm_up,
)
from fusedkv_jax.model import Decoder, fold_fusion

__all__ = [
    "Completion",
    "Decoder",
    "KVCache",
    "MLAConfig",
    "ModelConfig",
    "RopeConfig",
    "SamplingParams",
    "costs",
    "decode_step",
    "fold_fusion",
    "generate",
    "layouts",
    "prefill",
    "presets",
    "warm_up",
]
