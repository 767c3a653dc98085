"""Hugging Face's config.json to a `ModelConfig`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fusedkv_jax import layouts
from fusedkv_jax.config import BlockConfig, ConfigError, MLAConfig, ModelConfig, RopeConfig
from fusedkv_jax.interop.families import FAMILIES, activation
from fusedkv_jax.layouts import KVLayout, LayoutError
from fusedkv_jax.model.rotary import yarn_temperature
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
    layers = _required(fields, "num_hidden_layers")
    if type(layers) is not int or not 0 < layers <= _MOST_LAYERS:
        raise ConfigError(f"config.json: num_hidden_layers={layers!r}; use 1 to {_MOST_LAYERS}")
    if fields.get("quantization_config") is not None:
        raise ConfigError("config.json: quantization_config is not supported; use the original")
    latent = model_type in _LATENT
    heads = _required(fields, "num_attention_heads")
    dtype = fields.get("dtype", fields.get("torch_dtype"))
    dtype = "bfloat16" if str(dtype).endswith("bfloat16") else "float32"
    mla = _mla(fields) if latent else None
    block: dict[str, Any] = {"activation": activation(fields)} | family.block(fields)
    rope, window_rope = _ropes(fields)
    options: dict[str, Any] = {"qk_norm": False} | family.model(fields)
    config = ModelConfig(
        vocab_size=_required(fields, "vocab_size"),
        num_layers=layers,
        d_model=_required(fields, "hidden_size"),
        num_heads=heads,
        num_kv_heads=heads if latent else fields.get("num_key_value_heads") or heads,
        # With a latent, head_dim is not used; num_heads need not divide the width.
        head_dim=mla.nope_dim + mla.rope_dim if mla else fields.get("head_dim"),
        d_ff=_required(fields, "intermediate_size"),
        max_length=_required(fields, "max_position_embeddings"),
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
    """Rotary pairs are stored as channels (2c, 2c + 1): DeepSeek's convention."""
    return fields.get("model_type") in _LATENT and fields.get("rope_interleave") is not False


def _norm_eps(model_type: str) -> str:
    """The field of the norms' epsilon; a file may hold the other one too, which nobody reads."""
    return "layer_norm_eps" if model_type == "gpt_neox" else "rms_norm_eps"


def _required(fields: Mapping[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise ConfigError(f"config.json has no {name}; is it a complete model configuration?")
    return fields[name]


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


def _ropes(fields: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig | None]:
    """That of layers with full attention, and that of windowed ones if it is told apart."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config.json: rope_scaling={rope!r} is no object")
    if "full_attention" in rope:
        full, windowed = rope["full_attention"], rope.get("sliding_attention")
        return _rope(fields, full), _rope(fields, windowed) if windowed else None
    local = fields.get("rope_local_base_freq")
    if fields.get("model_type") == "gemma3_text":
        fields = {"rope_theta": 1_000_000.0, **fields}
        local = local or 10_000.0
    return _rope(fields, rope), _rope(fields, {"rope_theta": local}) if local else None


def _rope(fields: Mapping[str, Any], rope: Mapping[str, Any]) -> RopeConfig:
    partial = rope.get("partial_rotary_factor") or fields.get("partial_rotary_factor")
    fraction = partial or fields.get("rotary_pct") or 1.0
    return dataclasses.replace(_full_rope(fields, rope), fraction=fraction)


def _full_rope(fields: Mapping[str, Any], rope: Mapping[str, Any]) -> RopeConfig:
    theta = rope.get("rope_theta") or fields.get("rope_theta") or fields.get("rotary_emb_base")
    theta = theta or 10_000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ("longrope", "su"):  # its first name
        raise ConfigError(
            "config.json: LongRoPE, whose frequencies change with the length of the text, is not "
            "supported; take the release for short texts, such as Phi-3-mini-4k"
        )
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ConfigError(f"config.json: rope_type={kind!r}; choose default, linear, llama3, yarn")
    if rope.get("truncate", True) is not True:
        raise ConfigError("config.json: truncate of the rotary embedding is not supported")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=_required(rope, "factor"))
    longest = _required(fields, "max_position_embeddings")
    original = fields.get("original_max_position_embeddings")
    original = original or rope.get("original_max_position_embeddings") or longest
    common: dict[str, Any] = dict(theta=theta, original_length=original)
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
