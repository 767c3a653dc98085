"""Hugging Face's config.json to a `ModelConfig` and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fusedkv_jax.config import ConfigError, MLAConfig, ModelConfig, RopeConfig
from fusedkv_jax.layouts import KVLayout
from fusedkv_jax.model.rotary import magnitude, yarn_temperature

_LATENT = ("deepseek_v2", "deepseek_v3")
_MODEL_TYPES = ("llama", "qwen3", *_LATENT)

# What those architectures can switch on and we cannot compute: field, values that mean off.
_UNSUPPORTED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("attention_bias", (False,)),
    ("mlp_bias", (False,)),
    ("hidden_act", ("silu", "swish")),
    ("use_sliding_window", (False,)),
    ("partial_rotary_factor", (1, 1.0)),
    ("quantization_config", ()),
)


def config_from_huggingface(
    fields: Mapping[str, Any], layout: KVLayout | str = "mha"
) -> ModelConfig:
    """The `ModelConfig` of a config.json: Llama, Qwen3, or dense DeepSeek-V2 or V3.

    Both spellings of the rotary settings are read, `rope_scaling` with `rope_theta` (transformers
    4) and `rope_parameters` (transformers 5). A bfloat16 checkpoint gives bfloat16 parameters and
    activations, others float32.

    Args:
        fields: the parsed config.json.
        layout: layout of our model; `mha` computes what the original does.

    Raises:
        ConfigError: another architecture, or a setting that we cannot compute; it is named.
    """
    model_type = fields.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise ConfigError(f"model_type={model_type!r}; choose {', '.join(_MODEL_TYPES)}")
    _refuse_unsupported(fields)
    latent = model_type in _LATENT
    heads = _required(fields, "num_attention_heads")
    dtype = fields.get("dtype", fields.get("torch_dtype"))
    dtype = "bfloat16" if str(dtype).endswith("bfloat16") else "float32"
    default_head_dim = 128 if model_type == "qwen3" else None
    mla = _mla(fields) if latent else None
    return ModelConfig(
        vocab_size=_required(fields, "vocab_size"),
        num_layers=_required(fields, "num_hidden_layers"),
        d_model=_required(fields, "hidden_size"),
        num_heads=heads,
        num_kv_heads=heads if latent else fields.get("num_key_value_heads") or heads,
        # With a latent, head_dim is not used; num_heads need not divide the width.
        head_dim=mla.nope_dim + mla.rope_dim if mla else fields.get("head_dim") or default_head_dim,
        d_ff=_required(fields, "intermediate_size"),
        layout=layout,
        max_length=_required(fields, "max_position_embeddings"),
        qk_norm=model_type == "qwen3",
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope=_rope(fields),
        mla=mla,
        init_std=fields.get("initializer_range", 0.02),
        dtype=dtype,
        param_dtype=dtype,
    )


def has_interleaved_rope(fields: Mapping[str, Any]) -> bool:
    """Rotary pairs are stored as channels (2c, 2c + 1): DeepSeek's convention."""
    return fields.get("model_type") in _LATENT and fields.get("rope_interleave") is not False


def _required(fields: Mapping[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise ConfigError(f"config.json has no {name}; is it a complete model configuration?")
    return fields[name]


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    for name, off in _UNSUPPORTED:
        if fields.get(name) is not None and fields[name] not in off:
            allowed = f"only {off[0]!r} is supported" if off else "it is not supported"
            raise ConfigError(f"config.json: {name}={fields[name]!r}; {allowed}")
    kinds = set(fields.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise ConfigError(f"config.json: layer_types with {min(kinds)!r} is not supported")


def _mla(fields: Mapping[str, Any]) -> MLAConfig:
    layers = _required(fields, "num_hidden_layers")
    dense = fields.get("first_k_dense_replace", 0)
    if fields.get("n_routed_experts") and dense < layers:
        raise ConfigError(
            f"config.json: layers {dense} to {layers - 1} are mixtures of experts"
            f" (first_k_dense_replace={dense}); only dense layers are supported"
        )
    eps = fields.get("rms_norm_eps", 1e-6)
    if eps != 1e-6:
        raise ConfigError(
            f"config.json: rms_norm_eps={eps}; DeepSeek's norms of latents use 1e-6 whatever it"
            " says, so only 1e-6 is supported"
        )
    return MLAConfig(
        kv_lora_rank=_required(fields, "kv_lora_rank"),
        nope_dim=_required(fields, "qk_nope_head_dim"),
        rope_dim=_required(fields, "qk_rope_head_dim"),
        v_dim=_required(fields, "v_head_dim"),
        q_lora_rank=fields.get("q_lora_rank") or 0,
    )


def _rope(fields: Mapping[str, Any]) -> RopeConfig:
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ConfigError(f"config.json: rope_type={kind!r}; choose default, linear, llama3, yarn")
    if rope.get("partial_rotary_factor", 1) != 1 or rope.get("truncate", True) is not True:
        raise ConfigError("config.json: partial_rotary_factor and truncate are not supported")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=_required(rope, "factor"))
    longest = _required(fields, "max_position_embeddings")
    original = fields.get("original_max_position_embeddings")
    original = original or rope.get("original_max_position_embeddings") or longest
    common = dict(theta=theta, original_length=original)
    common["factor"] = rope.get("factor") or longest / original
    if kind == "llama3":
        return RopeConfig(
            scaling="llama3",
            low_freq_factor=_required(rope, "low_freq_factor"),
            high_freq_factor=_required(rope, "high_freq_factor"),
            **common,
        )
    return RopeConfig(
        scaling="yarn",
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        **_temperatures(rope, common["factor"]),
        **common,
    )


def _temperatures(rope: Mapping[str, Any], factor: float) -> dict[str, float]:
    """`mscale` and `mscale_all_dim` that give the attention factor which transformers computes."""
    top, bottom = rope.get("mscale"), rope.get("mscale_all_dim") or 0.0
    wanted = rope.get("attention_factor")
    if wanted is None and (not bottom or top):
        return {"mscale": top if top and bottom else 1.0, "mscale_all_dim": bottom}
    wanted = yarn_temperature(factor, 1.0) if wanted is None else wanted
    if factor <= 1:
        raise ConfigError(f"config.json: attention_factor={wanted} with factor={factor}; use 1")
    temperature = wanted * yarn_temperature(factor, bottom)
    return {"mscale": (temperature - 1.0) / (0.1 * math.log(factor)), "mscale_all_dim": bottom}


def config_to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a decoder in which every layer has its own keys and values.

    Llama without norms on queries and keys, Qwen3 with them.

    Raises:
        ConfigError: the architecture is neither of them.
    """
    if config.mla is not None:
        raise ConfigError("mla is set; only models with separate keys and values are exported")
    for i, layer in enumerate(config.kv_layout.layers):
        ordinary = layer.key.own and layer.value.own and not layer.kv_norm
        if not ordinary or layer.key.sources or layer.value.sources or layer.window:
            raise ConfigError(
                f"layer {i} is not an ordinary one; transformers has no architecture for this"
                " layout, only for mha"
            )
    name = "Qwen3" if config.qk_norm else "Llama"
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.channels,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
        "torch_dtype": config.param_dtype,
    }


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
