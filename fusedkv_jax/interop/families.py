"""What the families of transformers' models switch on, as options of a `ModelConfig`.

Everything that is common to them is in `huggingface_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedkv_jax.config import ConfigError
from fusedkv_jax.interop import lckv
from fusedkv_jax.layouts import KVLayout

Fields = Mapping[str, Any]
Options = dict[str, Any]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        block: options of its `BlockConfig`.
        model: options of its `ModelConfig`.
        windows: the attention window of each layer, None for full; by default all are full.
        defaults: what transformers assumes where config.json is silent.
        layout: whose keys and values each layer reads; by default its own.
        activation: the field that names the activation of its feed-forward.
    """

    block: Callable[[Fields], Options] = lambda fields: {}
    model: Callable[[Fields], Options] = lambda fields: {}
    windows: Callable[[Fields], list[int | None]] = lambda fields: _full(fields)
    defaults: Fields = field(default_factory=dict)
    layout: Callable[[Fields], KVLayout | str] = lambda fields: "mha"
    activation: str = "hidden_act"


def biases(fields: Fields) -> Options:
    """`attention_bias` and `mlp_bias`."""
    return _attention_biases(fields) | {"mlp_bias": bool(fields.get("mlp_bias"))}


def _attention_biases(fields: Fields) -> Options:
    biased = bool(fields.get("attention_bias"))
    return {"qkv_bias": biased, "output_bias": biased}


def activation(fields: Fields, field: str) -> str:
    """The activation of the feed-forward that a field names, by our name; silu without it."""
    name = fields.get(field, "silu")
    if name not in _ACTIVATIONS:
        raise ConfigError(f"config.json: {field}={name!r}; choose {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _full(fields: Fields) -> list[int | None]:
    for kind in fields.get("layer_types") or ():
        if kind != "full_attention":
            raise ConfigError(f"config.json: layer_types with {kind!r} is not supported")
    return [None] * fields["num_hidden_layers"]


def _all_windowed(fields: Fields) -> list[int | None]:
    return [fields.get("sliding_window")] * fields["num_hidden_layers"]


def _mistral_windows(fields: Fields) -> list[int | None]:
    if "layer_types" in fields:  # by which transformers takes it for another family
        raise ConfigError("config.json: layer_types of Mistral, which is Ministral, not supported")
    return _all_windowed(fields)


def _pattern(fields: Fields, every: int = 1) -> list[int | None]:
    """By `layer_types`, or every n-th layer is full."""
    layers, window = fields["num_hidden_layers"], fields.get("sliding_window")
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = [
            "sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)
        ]
    windows = {"full_attention": None, "sliding_attention": window}
    for kind in kinds:
        if kind not in windows:
            raise ConfigError(f"config.json: layer_types with {kind!r} is not supported")
    if len(kinds) != layers:
        raise ConfigError(f"config.json: {len(kinds)} layer_types for {layers} layers")
    if window is None and "sliding_attention" in kinds:
        raise ConfigError("config.json: layer_types with windows, and no sliding_window")
    return [windows[kind] for kind in kinds]


def _windows_if_used(fields: Fields) -> list[int | None]:
    """Qwen's: the upper layers are windowed, and only with `use_sliding_window`."""
    if not fields.get("use_sliding_window"):
        return _full(fields)
    if fields.get("layer_types"):
        return _pattern(fields)
    first, window = fields.get("max_window_layers") or 0, fields.get("sliding_window")
    return [window if i >= first else None for i in range(fields["num_hidden_layers"])]


def _gemma_block(fields: Fields) -> Options:
    # Gemma's first release says "gelu" and means its approximation.
    means = {"activation": "gelu_tanh"} if fields["hidden_act"] == "gelu" else {}
    return _attention_biases(fields) | {"norm": "rms_plus_one"} | means


def _gemma3_block(fields: Fields) -> Options:
    # transformers reads `attn_logit_softcapping` of Gemma 3, and does not compute it.
    return _attention_biases(fields) | {
        "norm": "rms_plus_one",
        "norm_placement": "both",
        "attention_scale": float(fields.get("query_pre_attn_scalar") or 256) ** -0.5,
    }


def _gemma2_block(fields: Fields) -> Options:
    return _gemma3_block(fields) | {"attention_softcap": fields.get("attn_logit_softcapping")}


def _gemma_model(fields: Fields) -> Options:
    if fields.get("use_bidirectional_attention"):
        raise ConfigError("config.json: use_bidirectional_attention is not supported")
    return {"embedding_scale": fields["hidden_size"] ** 0.5}


def _gemma2_model(fields: Fields) -> Options:
    return _gemma_model(fields) | {"logit_softcap": fields.get("final_logit_softcapping")}


def _without_rope(fields: Fields) -> Options:
    layers, every = fields["num_hidden_layers"], fields.get("no_rope_layer_interval") or 4
    uses = fields.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(layers)]
    return {"nope_layers": tuple(i for i in range(layers) if not uses[i])}


def _windows_without_rope(fields: Fields) -> list[int | None]:
    """SmolLM3's: layers without rotary embedding are windowed, and only if windows are used."""
    if fields.get("layer_types") or not fields.get("use_sliding_window"):
        return _windows_if_used(fields)
    plain, window = _without_rope(fields)["nope_layers"], fields.get("sliding_window")
    return [window if i in plain else None for i in range(fields["num_hidden_layers"])]


def _granite_block(fields: Fields) -> Options:
    return biases(fields) | {
        "attention_scale": fields.get("attention_multiplier", 1.0),
        "residual_scale": fields.get("residual_multiplier", 1.0),
    }


def _granite_model(fields: Fields) -> Options:
    return {
        "embedding_scale": fields.get("embedding_multiplier", 1.0),
        "logit_scale": 1.0 / fields.get("logits_scaling", 1.0),
    }


def _neox_block(fields: Fields) -> Options:
    biased = fields.get("attention_bias", True)
    return {
        "norm": "layer",
        "gated": False,
        "parallel": bool(fields.get("use_parallel_residual", True)),
        "qkv_bias": biased,
        "output_bias": biased,
        "mlp_bias": True,
    }


_TIED: Fields = {"tie_word_embeddings": True}
_GEMMA: Fields = {**_TIED, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh"}
_GEMMA2: Fields = {
    **_TIED,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "sliding_window": 4096,
}
_QWEN: Fields = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(block=biases),
    "mistral": Family(
        windows=_mistral_windows, defaults={"num_key_value_heads": 8, "sliding_window": 4096}
    ),
    "qwen2": Family(
        block=lambda fields: {"qkv_bias": True},
        windows=_windows_if_used,
        defaults=_QWEN,
    ),
    "qwen3": Family(
        block=_attention_biases,
        model=lambda fields: {"qk_norm": True},
        windows=_windows_if_used,
        defaults={**_QWEN, "head_dim": 128},
    ),
    "smollm3": Family(
        block=biases,
        model=_without_rope,
        windows=_windows_without_rope,
        defaults={**_TIED, "num_key_value_heads": 4, "rope_theta": 2_000_000.0},
    ),
    "granite": Family(block=_granite_block, model=_granite_model),
    "olmo2": Family(
        block=lambda fields: (
            _attention_biases(fields) | {"norm_placement": "post", "qk_norm_over": "all"}
        ),
        model=lambda fields: {"qk_norm": True},
        defaults={"rms_norm_eps": 1e-5},
    ),
    "phi3": Family(windows=_all_windowed, defaults={"rms_norm_eps": 1e-5}),
    "gemma": Family(
        block=_gemma_block,
        model=_gemma_model,
        defaults={**_GEMMA, "num_key_value_heads": 16},
    ),
    "gemma2": Family(
        block=_gemma2_block,
        model=_gemma2_model,
        windows=lambda fields: _pattern(fields, 2),
        defaults={**_GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        activation="hidden_activation",
    ),
    "gemma3_text": Family(
        block=_gemma3_block,
        model=lambda fields: _gemma2_model(fields) | {"qk_norm": True},
        windows=lambda fields: _pattern(fields, fields.get("sliding_window_pattern", 6)),
        defaults=_GEMMA2,
        activation="hidden_activation",
    ),
    "gpt_neox": Family(
        block=_neox_block,
        defaults={"layer_norm_eps": 1e-5, "rotary_pct": 0.25, "hidden_act": "gelu"},
    ),
    "deepseek_v2": Family(block=biases),
    "deepseek_v3": Family(block=biases),
    lckv.MODEL_TYPE: Family(
        block=biases,
        windows=lambda fields: [None] * fields["num_hidden_layers"],  # the layout has them
        layout=lckv.layout_of,
    ),
}
