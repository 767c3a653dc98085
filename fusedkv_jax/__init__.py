"""Decoder language models whose upper layers rebuild their KV cache from lower layers' caches."""

from importlib import metadata

from fusedkv_jax import compression, costs, interop, layouts, presets
from fusedkv_jax.cache import KVCache
from fusedkv_jax.config import BlockConfig, MLAConfig, ModelConfig, RopeConfig
from fusedkv_jax.generation import (
    BeamSearchParams,
    Completion,
    SamplingParams,
    SelfSpeculation,
    beam_search,
    chat,
    decode_step,
    generate,
    prefill,
    stream,
    warm_up,
)
from fusedkv_jax.model import Decoder, fold_fusion

__version__ = metadata.version("fusedkv_jax")

__all__ = [
    "BeamSearchParams",
    "BlockConfig",
    "Completion",
    "Decoder",
    "KVCache",
    "MLAConfig",
    "ModelConfig",
    "RopeConfig",
    "SamplingParams",
    "SelfSpeculation",
    "__version__",
    "beam_search",
    "chat",
    "compression",
    "costs",
    "decode_step",
    "fold_fusion",
    "generate",
    "interop",
    "layouts",
    "prefill",
    "presets",
    "stream",
    "warm_up",
]
