"""What vLLM calls when it starts: makes our architecture and our configuration known."""

from __future__ import annotations

import importlib.util
from typing import Any

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.interop.own_format import MODEL_TYPE

ARCHITECTURE = "FusedKVForCausalLM"
# What tpu-inference sizes a layer's pages by; it has no other name for layers of wider records.
_NARROW, _WIDE = "sliding_attention", "full_attention"


def register() -> None:
    """Register with transformers, vLLM and tpu-inference; nothing where the last is missing."""
    if importlib.util.find_spec("tpu_inference") is None:
        return
    from tpu_inference.models.common.model_loader import register_model
    from transformers import AutoConfig

    from fusedkv_jax.interop.tpu_inference.model import FusedKVForCausalLM

    AutoConfig.register(MODEL_TYPE, configuration(), exist_ok=True)
    register_model(ARCHITECTURE, FusedKVForCausalLM)


def cache_fields(config: ModelConfig) -> dict[str, Any]:
    """What tells tpu-inference which layers have pages, and how wide they are.

    Raises:
        ConfigError: the layout cannot be folded.
    """
    from fusedkv_jax.interop.tpu_inference.folding import fold

    found = fold(config)
    last = len(found.records) - 1
    size = config.channels
    return {
        "num_kv_shared_layers": config.num_layers - last - 1,
        "layer_types": [_NARROW] * last + [_WIDE] * (config.num_layers - last),
        "head_dim": size,
        "global_head_dim": size * found.records[last].width,
    }


def configuration() -> type:
    """transformers' class for our config.json."""
    from transformers import PretrainedConfig

    class FusedKVConfig(PretrainedConfig):
        model_type = MODEL_TYPE

        def __init__(self, fusedkv: dict[str, Any] | None = None, **fields: Any):
            if fusedkv is not None:
                self.fusedkv = fusedkv
                fields |= cache_fields(ModelConfig.from_dict(fusedkv))
            super().__init__(**fields)

    return FusedKVConfig
