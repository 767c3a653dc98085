"""A `ModelConfig` as the config.json of the family of transformers' that computes the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from fusedkv_jax.config import ConfigError, ModelConfig, RopeConfig
from fusedkv_jax.interop.huggingface_config import config_from_huggingface
from fusedkv_jax.model.rotary import magnitude
from fusedkv_jax.validation import check_kind

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# How a model is computed, which no family says.
_RUNTIME = ("dtype", "remat", "scan_layers", "attention", "layout")


def config_to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a decoder in which every layer has its own keys and values.

    It is that of the first family whose config.json, read back, is this configuration.

    Raises:
        ConfigError: there is none.
    """
    check_kind("config", config, ModelConfig, "a ModelConfig", ConfigError)
    if config.mla is not None:
        raise ConfigError("mla is set; only models with separate keys and values are exported")
    for i, layer in enumerate(config.kv_layout.layers):
        ordinary = layer.key.own and layer.value.own and not layer.kv_norm
        if not ordinary or layer.key.sources or layer.value.sources:
            raise ConfigError(
                f"layer {i} is not an ordinary one; transformers has no architecture for this"
                " layout, only for mha"
            )
    # Only the families of `_partial` turn a part of the channels.
    for family in (*(_families(config) if config.rope.fraction == 1 else ()), *_partial(config)):
        fields = _common(config) | family
        if _says(fields, config):
            return fields
    raise ConfigError(
        "transformers has no architecture with these options of the layers (block, ropes, scales,"
        " windows) together"
    )


def _common(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.channels,
        "hidden_act": _ACTIVATIONS[config.block.activation],
        "max_position_embeddings": config.max_length,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.block.qkv_bias,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
        "torch_dtype": config.param_dtype,
    }


def _families(config: ModelConfig) -> Iterator[dict[str, Any]]:
    """What each family's config.json would say of the configuration, the most common first."""

    def family(name: str, architecture: str, **fields: Any) -> dict[str, Any]:
        return {"architectures": [f"{architecture}ForCausalLM"], "model_type": name, **fields}

    block, layers = config.block, config.kv_layout.layers
    window = next((layer.window for layer in layers if layer.window), None)
    kinds = ["sliding_attention" if layer.window else "full_attention" for layer in layers]
    windows: dict[str, Any] = {"sliding_window": window, "layer_types": kinds}
    used = windows | {"use_sliding_window": window is not None}
    act = {"hidden_activation": _ACTIVATIONS[block.activation]}
    scale = block.attention_scale or config.channels**-0.5
    scalar = scale**-2
    gemma = act | {
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "attn_logit_softcapping": block.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }
    local = config.window_rope or config.rope
    if config.qk_norm:
        yield family("qwen3", "Qwen3", **used)
    else:
        yield family("llama", "Llama", mlp_bias=block.mlp_bias)
        yield family("mistral", "Mistral", sliding_window=window)
        yield family("qwen2", "Qwen2", **used)
    yield family(
        "smollm3",
        "SmolLM3",
        no_rope_layers=[int(i not in config.nope_layers) for i in range(config.num_layers)],
        mlp_bias=block.mlp_bias,
        pad_token_id=None,
        **used,
    )
    yield family(
        "granite",
        "Granite",
        mlp_bias=block.mlp_bias,
        embedding_multiplier=config.embedding_scale,
        logits_scaling=1.0 / config.logit_scale,
        residual_multiplier=block.residual_scale,
        attention_multiplier=scale,
    )
    yield family("olmo2", "Olmo2", pad_token_id=None)
    yield family("gemma", "Gemma", **act)
    if type(gemma["query_pre_attn_scalar"]) is not int:  # transformers takes no other
        return
    # Both compute the mask of a window whether a layer has one or not.
    windows["sliding_window"] = window or config.max_length
    yield family("gemma2", "Gemma2", **gemma, **windows)
    yield family(
        "gemma3_text",
        "Gemma3",
        rope_parameters={
            "full_attention": _rope_parameters(config.rope),
            "sliding_attention": _rope_parameters(local),
        },
        **gemma,
        **windows,
    )


def _partial(config: ModelConfig) -> Iterator[dict[str, Any]]:
    """The same of families that may turn a part of the channels."""
    block, layers = config.block, config.kv_layout.layers
    rope = _rope_parameters(config.rope) | {"partial_rotary_factor": config.rope.fraction}
    # Where there is a `rope_scaling`, transformers takes that, which knows no share.
    ropes: dict[str, Any] = {"rope_parameters": rope, "rope_scaling": None}
    if config.rope.scaling == "none":  # of the others Phi-3 has LongRoPE only
        yield {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "sliding_window": layers[0].window,
            "original_max_position_embeddings": config.max_length,
            "pad_token_id": None,
            **ropes,
        }
    # Queries, keys and values are one matrix, cut by heads; their width is the model's.
    square = config.num_heads * config.channels == config.d_model
    if square and config.kv_heads == config.num_heads:
        yield {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "use_parallel_residual": block.parallel,
            "attention_bias": block.qkv_bias,
            "layer_norm_eps": config.norm_eps,
            **ropes,
        }


def _says(fields: dict[str, Any], config: ModelConfig) -> bool:
    """Whether reading the fields gives this configuration."""
    try:
        found = config_from_huggingface(fields)
    except ConfigError:
        return False
    if _turn_alike(found.rope, config.rope):
        found = dataclasses.replace(found, rope=config.rope)
    same = {name: getattr(config, name) for name in _RUNTIME}
    windows = ([layer.window for layer in each.kv_layout.layers] for each in (found, config))
    # A family that tells no two ropes apart gives none for windows.
    ropes = found.layer_ropes == config.layer_ropes
    same |= {"window_rope": config.window_rope} if ropes else {}
    return len({tuple(each) for each in windows}) == 1 and (
        dataclasses.replace(found, **same) == config
    )


def _turn_alike(found: RopeConfig, rope: RopeConfig) -> bool:
    """Whether two ropes differ in nothing but how their attention factor is written."""
    written = dataclasses.replace(found, mscale=rope.mscale, mscale_all_dim=rope.mscale_all_dim)
    return written == rope and math.isclose(magnitude(found), magnitude(rope), rel_tol=1e-12)


def _rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    scaling = _rope_scaling(rope) or {"rope_type": "default"}
    return scaling | {"rope_theta": rope.theta}


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    fields: dict[str, Any] = {"rope_type": rope.scaling, "factor": float(rope.factor)}
    if rope.scaling == "linear":
        return fields
    fields["original_max_position_embeddings"] = rope.original_length
    if rope.scaling == "llama3":
        fields["low_freq_factor"] = float(rope.low_freq_factor)
        fields["high_freq_factor"] = float(rope.high_freq_factor)
        return fields
    fields |= {"beta_fast": float(rope.beta_fast), "beta_slow": float(rope.beta_slow)}
    if (rope.mscale, rope.mscale_all_dim) != (1.0, 0.0):
        fields["attention_factor"] = magnitude(rope)
    return fields
