"""Decoder language models whose upper layers rebuild their KV cache from lower layers' caches."""

from importlib import metadata
from typing import TYPE_CHECKING

import pallas_kernels.xla_flags  # noqa: F401 (before anything computes)
from fusedkv_jax.lazy import lazy_names

__version__ = metadata.version("fusedkv_jax")

__all__ = [
    "BeamSearchParams",
    "BlockConfig",
    "Completion",
    "Decoder",
    "LLM",
    "KVCache",
    "MLAConfig",
    "ModelConfig",
    "NGramSpeculation",
    "RopeConfig",
    "SamplingParams",
    "SelfSpeculation",
    "StructuredOutputsParams",
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

if TYPE_CHECKING:
    from fusedkv_jax import compression, costs, interop, layouts, presets
    from fusedkv_jax.cache import KVCache
    from fusedkv_jax.config import BlockConfig, MLAConfig, ModelConfig, RopeConfig
    from fusedkv_jax.generation import (
        BeamSearchParams,
        Completion,
        SamplingParams,
        SelfSpeculation,
        StructuredOutputsParams,
        beam_search,
        chat,
        decode_step,
        generate,
        prefill,
        stream,
        warm_up,
    )
    from fusedkv_jax.model import Decoder, fold_fusion
    from fusedkv_jax.serving import LLM, NGramSpeculation
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        __all__,
        {
            "cache": ["KVCache"],
            "config": ["BlockConfig", "MLAConfig", "ModelConfig", "RopeConfig"],
            "generation": [
                "BeamSearchParams",
                "Completion",
                "SamplingParams",
                "SelfSpeculation",
                "StructuredOutputsParams",
                "beam_search",
                "chat",
                "decode_step",
                "generate",
                "prefill",
                "stream",
                "warm_up",
            ],
            "model": ["Decoder", "fold_fusion"],
            "serving": ["LLM", "NGramSpeculation"],
        },
    )
