"""Import of GGUF files, the format of llama.cpp: Llama and Mistral, Qwen2, Qwen3."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fusedkv_jax.config import ConfigError, FloatType, ModelConfig
from fusedkv_jax.interop.gguf_file import GgufError, GgufFile
from fusedkv_jax.interop.huggingface import load_huggingface
from fusedkv_jax.interop.huggingface_config import config_from_huggingface
from fusedkv_jax.layouts import KVLayout
from fusedkv_jax.model import Decoder
from fusedkv_jax.model.rotary import frequencies

# llama.cpp's name for an architecture, and that of transformers. "llama" is Mistral, too.
_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


def load_gguf(
    path: str | os.PathLike[str],
    layout: KVLayout | str | None = None,
    *,
    dtype: FloatType = "float32",
    seed: int = 0,
) -> Decoder:
    """Build a decoder from a GGUF file, whose weights are dequantized.

    Args:
        path: the file.
        layout: layout of the decoder; by default `mha`. See `load_huggingface` for what another
            one means.
        dtype: of the parameters and the activations.
        seed: of the stream weights' initial values, in a layout that has some.

    Raises:
        GgufError: the file is damaged, or no GGUF file.
        ConfigError: an architecture or setting that is not supported.
        TensorError: tensors are missing or unknown, or have a wrong shape.
        ImportError: the package `gguf` is missing.
    """
    with GgufFile(path) as file:
        fields = config_of(file)
        config = config_from_huggingface(fields).replace(dtype=dtype, param_dtype=dtype)
        # llama.cpp stores the rotary pairs of this architecture as channels (2c, 2c + 1).
        interleaved = file.metadata["general.architecture"] == "llama"
        return load_huggingface(
            _Renamed(file), layout, config=config, rope_interleave=interleaved, seed=seed
        )


def gguf_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The configuration in a GGUF file; raises as `load_gguf`."""
    with GgufFile(path) as file:
        return config_from_huggingface(config_of(file))


def config_of(file: GgufFile) -> dict[str, Any]:
    """What config.json would say of the model.

    Raises:
        ConfigError: an architecture or setting that is not supported.
        GgufError: a value is missing, or of the wrong type.
    """
    known = file.metadata
    architecture = known.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        names = ", ".join(_ARCHITECTURES)
        raise ConfigError(f"{file.path}: general.architecture={architecture!r}; choose {names}")

    def value(name: str, kind: type, default: Any = None) -> Any:
        found = known.get(f"{architecture}.{name}", default)
        if type(found) is not kind and found is not default or found is None:
            raise GgufError(f"{file.path}: {architecture}.{name} is {found!r}, not {kind.__name__}")
        return found

    heads = value("attention.head_count", int)
    width = value("embedding_length", int)
    head_dim = value("attention.key_length", int, width // max(heads, 1))
    for name, expected in (
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
    ):
        if value(name, int, expected) != expected:
            raise ConfigError(
                f"{file.path}: {architecture}.{name} is not {expected}, the keys' size"
            )
    tokens = known.get("tokenizer.ggml.tokens")
    fields: dict[str, Any] = {
        "model_type": _ARCHITECTURES[architecture],
        "vocab_size": value("vocab_size", int, len(tokens) if isinstance(tokens, list) else None),
        "hidden_size": width,
        "num_hidden_layers": value("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "intermediate_size": value("feed_forward_length", int),
        "max_position_embeddings": value("context_length", int),
        # Stored as float32: 1e-5 would be 9.99999974e-06.
        "rms_norm_eps": _short(value("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _short(value("rope.freq_base", float, 10_000.0)),
        "tie_word_embeddings": "output.weight" not in file,
        "sliding_window": value("attention.sliding_window", int, 0) or None,
    }
    if fields["sliding_window"] and architecture == "llama":
        fields["model_type"] = "mistral"
    fields["rope_scaling"] = _rope_scaling(file, fields, value)
    return fields


def _rope_scaling(file: GgufFile, fields: Mapping[str, Any], value: Any) -> dict[str, Any] | None:
    kind = value("rope.scaling.type", str, "linear")  # llama.cpp's default, with a factor of 1
    if kind not in ("none", "linear"):
        raise ConfigError(f"{file.path}: rope.scaling.type={kind!r} is not supported")
    if value("rope.scaling.attn_factor", float, 1.0) != 1:
        raise ConfigError(f"{file.path}: rope.scaling.attn_factor is not supported")
    old_name = value("rope.scale_linear", float, 0.0)
    factor = _short(value("rope.scaling.factor", float, old_name)) or 1.0
    scaled = kind == "linear" and factor != 1
    if _ROPE_FACTORS not in file:
        return {"rope_type": "linear", "factor": factor} if scaled else None
    if scaled:
        raise ConfigError(f"{file.path}: rope.scaling.factor={factor} with {_ROPE_FACTORS}")
    return _llama3(file, fields)


def _llama3(file: GgufFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3.1's scaling, which llama.cpp stores as a divisor of each channel pair's frequency."""
    divisors = file[_ROPE_FACTORS]
    scaling = {
        "rope_type": "llama3",
        "factor": float(round(float(divisors.max()), 3)),
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    rope = config_from_huggingface({**fields, "rope_scaling": scaling}).rope
    plain = rope.theta ** -(np.arange(0, fields["head_dim"], 2) / fields["head_dim"])
    expected = plain / frequencies(rope, fields["head_dim"])
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise ConfigError(f"{file.path}: {_ROPE_FACTORS} is not the scaling of Llama 3.1")
    return scaling


def _short(value: float) -> float:
    """The shortest decimal number that is this float32."""
    return float(str(np.float32(value)))


class _Renamed(Mapping[str, np.ndarray]):
    """The tensors under the names of transformers."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._theirs = {_renamed(name): name for name in file if name != _ROPE_FACTORS}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file[self._theirs[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._theirs)

    def __len__(self) -> int:
        return len(self._theirs)


def _renamed(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{kind}"
    first, _, rest = stem.partition(".")
    number, _, part = rest.partition(".")
    if first == "blk" and part in _LAYER:
        return f"model.layers.{number}.{_LAYER[part]}.{kind}"
    return name  # which will be named as unknown
