"""Our own config.json, for what no family of transformers' computes.

The PyTorch file beside it, `pytorch/modeling_fusedkv.py`, documents its fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusedkv_jax.config import ConfigError, ModelConfig, RopeConfig
from fusedkv_jax.model.rotary import frequencies, magnitude, yarn_temperature

MODEL_TYPE = "fusedkv"
MODELING = Path(__file__).parent / "pytorch" / "modeling_fusedkv.py"


def is_own(fields: Mapping[str, Any] | None) -> bool:
    """Whether a config.json is ours."""
    return fields is not None and fields.get("model_type") == MODEL_TYPE


def read(fields: Mapping[str, Any]) -> ModelConfig:
    """The configuration in our config.json.

    Raises:
        ConfigError: it is not complete, or wrong.
        LayoutError: so is its layout.
    """
    own = fields.get("fusedkv")
    if not isinstance(own, Mapping):
        raise ConfigError("config.json has no fusedkv; is it a complete model configuration?")
    return ModelConfig.from_dict(own)


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a configuration."""
    module = MODELING.stem
    return {
        "architectures": ["FusedKVForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{module}.FusedKVConfig",
            "AutoModelForCausalLM": f"{module}.FusedKVForCausalLM",
        },
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.param_dtype,
        "fusedkv": dataclasses.asdict(config),
        "derived": _derived(config),
    }


def _derived(config: ModelConfig) -> dict[str, Any]:
    kinds = [rope for rope in config.rope_kinds if rope is not None]
    ropes = [None if rope is None else kinds.index(rope) for rope in config.layer_ropes]
    return {
        "softmax_scale": _softmax_scale(config),
        "rotary": [_table(rope, config.geometry.rotary) for rope in kinds],
        "layer_rotary": ropes,
        "cyclic_groups": [list(group) for group in config.kv_layout.cyclic_groups],
    }


def _softmax_scale(config: ModelConfig) -> float:
    if config.mla is None:
        return config.block.attention_scale or config.channels**-0.5
    scale = (config.mla.nope_dim + config.mla.rope_dim) ** -0.5
    if config.rope.scaling == "yarn":  # DeepSeek's temperature of the scores
        scale *= yarn_temperature(config.rope.factor, config.rope.mscale_all_dim) ** 2
    return scale


def _table(rope: RopeConfig, channels: int) -> dict[str, Any]:
    return {
        "inverse_frequencies": frequencies(rope, channels).tolist(),
        "scale": magnitude(rope),
    }
