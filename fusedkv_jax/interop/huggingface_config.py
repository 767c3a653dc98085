"""Hugging Face's config.json to a `ModelConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fusedkv_jax import layouts
from fusedkv_jax.config import BlockConfig, ConfigError, MLAConfig, ModelConfig
from fusedkv_jax.interop.families import FAMILIES, activation
from fusedkv_jax.interop.huggingface_rope import required, ropes
from fusedkv_jax.layouts import KVLayout, LayoutError
from fusedkv_jax.validation import check_kind

_LATENT = ("deepseek_v2", "deepseek_v3")
_MOST_LAYERS = 10_000  # a larger number is a mistake, or an attempt to exhaust memory


def config_from_huggingface(
    fields: Mapping[str, Any], layout: KVLayout | str | None = None
) -> ModelConfig:
    """The `ModelConfig` of a config.json of the families in `families.FAMILIES`.

    Both spellings of the rotary settings are read, `rope_scaling` with `rope_theta` (transformers
    4) and `rope_parameters` (transformers 5). A bfloat16 checkpoint gives bfloat16 parameters and
    activations, others float32.

    Args:
        fields: the parsed config.json.
        layout: layout of our model; by default what the original computes, `mha` in most
            families. Its layers get the attention windows of the original's, unless it has
            windows of its own.

    Raises:
        ConfigError: another architecture, or a setting that we cannot compute; it is named.
    """
    try:
        return _config(fields, layout)
    except (ConfigError, LayoutError):
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"config.json: a value of the wrong type or size: {reason}") from None


def _config(fields: Mapping[str, Any], layout: KVLayout | str | None) -> ModelConfig:
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"model_type={model_type!r}; choose {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    fields = {**family.defaults, **fields}
    layers = required(fields, "num_hidden_layers")
    if type(layers) is not int or not 0 < layers <= _MOST_LAYERS:
        raise ConfigError(f"config.json: num_hidden_layers={layers!r}; use 1 to {_MOST_LAYERS}")
    if fields.get("quantization_config") is not None:
        raise ConfigError("config.json: quantization_config is not supported; use the original")
    if not fields.get("is_causal", True) or fields.get("transformers_weights"):
        raise ConfigError("config.json: is_causal=False and transformers_weights are not supported")
    latent = model_type in _LATENT
    heads = required(fields, "num_attention_heads")
    dtype = fields.get("dtype", fields.get("torch_dtype"))
    dtype = "bfloat16" if str(dtype).endswith("bfloat16") else "float32"
    mla = _mla(fields) if latent else None
    block: dict[str, Any] = {"activation": activation(fields, family.activation)}
    block |= family.block(fields)
    rope, window_rope = ropes(fields)
    options: dict[str, Any] = {"qk_norm": False} | family.model(fields)
    config = ModelConfig(
        vocab_size=required(fields, "vocab_size"),
        num_layers=layers,
        d_model=required(fields, "hidden_size"),
        num_heads=heads,
        num_kv_heads=heads if latent else fields.get("num_key_value_heads") or heads,
        # With a latent, head_dim is not used; num_heads need not divide the width.
        head_dim=mla.nope_dim + mla.rope_dim if mla else fields.get("head_dim"),
        d_ff=required(fields, "intermediate_size"),
        max_length=required(fields, "max_position_embeddings"),
        tie_embeddings=fields.get("tie_word_embeddings") or False,
        norm_eps=fields.get(_norm_eps(model_type)) or 1e-6,
        block=BlockConfig(**block),
        rope=rope,
        mla=mla,
        init_std=fields.get("initializer_range") or 0.02,
        dtype=dtype,
        param_dtype=dtype,
        **options,
    )
    windows = family.windows(fields)
    if 0 in windows:
        raise ConfigError("config.json: sliding_window=0; use null for attention to all tokens")
    if config.block.attention_scale == config.channels**-0.5:
        plain = dataclasses.replace(config.block, attention_scale=None)
        config = config.replace(block=plain)
    layout = family.layout(fields) if layout is None else layout
    config = config.replace(layout=_with_windows(layout, layers, windows))
    return config if window_rope in (None, rope) else config.replace(window_rope=window_rope)


def with_layout(config: ModelConfig, layout: KVLayout | str) -> ModelConfig:
    """The configuration with another layout, whose layers keep their windows."""
    check_kind("config", config, ModelConfig, "a ModelConfig", ConfigError)
    windows = [layer.window for layer in config.kv_layout.layers]
    return config.replace(layout=_with_windows(layout, config.num_layers, windows))


def _with_windows(
    layout: KVLayout | str, layers: int, windows: Sequence[int | None]
) -> KVLayout | str:
    if not any(windows):
        return layout
    found = layouts.resolve(layout, layers) if isinstance(layout, str) else layout
    if any(layer.window for layer in found.layers) or found.num_layers != layers:
        return found
    windowed = (
        dataclasses.replace(layer, window=window)
        for layer, window in zip(found.layers, windows, strict=True)
    )
    return dataclasses.replace(found, layers=tuple(windowed), spec="")


def has_interleaved_rope(fields: Mapping[str, Any]) -> bool:
    """Rotary pairs are stored as channels (2c, 2c + 1): DeepSeek's way, which only V3 may leave."""
    model_type = fields.get("model_type")
    if model_type == "deepseek_v3":
        return bool(fields.get("rope_interleave", True))
    return model_type in _LATENT


def _norm_eps(model_type: str) -> str:
    """The field of the norms' epsilon; a file may hold the other one too, which nobody reads."""
    return "layer_norm_eps" if model_type == "gpt_neox" else "rms_norm_eps"


def _mla(fields: Mapping[str, Any]) -> MLAConfig:
    layers = required(fields, "num_hidden_layers")
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
        kv_lora_rank=required(fields, "kv_lora_rank"),
        nope_dim=required(fields, "qk_nope_head_dim"),
        rope_dim=required(fields, "qk_rope_head_dim"),
        v_dim=required(fields, "v_head_dim"),
        q_lora_rank=fields.get("q_lora_rank") or 0,
    )
