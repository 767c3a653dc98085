"""Families that name their tensors in other ways, or keep several matrices in one.

Phi-3 stacks queries, keys and values, and gate and up; GPT-NeoX stacks the three for each head.
`as_llama` shows them under Llama's names, cut apart; `from_llama` puts them together again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fusedkv_jax.config import ConfigError, ModelConfig
from fusedkv_jax.interop import lckv

Cut = Callable[[np.ndarray], np.ndarray]
Join = Callable[[list[np.ndarray]], np.ndarray]

_QKV = ("q_proj", "k_proj", "v_proj")
_NEOX = {
    "attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
_NEOX_WHOLE = {
    "gpt_neox.embed_in.weight": "model.embed_tokens.weight",
    "gpt_neox.final_layer_norm.weight": "model.norm.weight",
    "gpt_neox.final_layer_norm.bias": "model.norm.bias",
    "embed_out.weight": "lm_head.weight",
}
# Constants that old checkpoints hold.
_IGNORED = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")


def as_llama(model_type: Any, config: ModelConfig, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint's tensors under Llama's names; those of most families as they are."""
    if model_type == "phi3":
        return _Cut(tensors, _phi3(config, tensors))
    if model_type == "gpt_neox":
        return _Cut(tensors, _neox(config, tensors))
    if model_type == lckv.MODEL_TYPE:
        return lckv.OwnNames(tensors)
    return tensors


class _Cut(Mapping[str, Any]):
    """Parts of tensors, each cut out when it is asked for."""

    def __init__(
        self, tensors: Mapping[str, Any], parts: Mapping[str, tuple[str, Cut | None]]
    ) -> None:
        self._tensors, self._parts = tensors, parts

    def __getitem__(self, name: str) -> np.ndarray:
        whole, cut = self._parts[name]
        array = np.asarray(self._tensors[whole])
        return array if cut is None else cut(array)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _rows(name: str, sizes: Mapping[str, int]) -> dict[str, Cut]:
    """Cuts of a matrix whose rows are those of several, one after the other."""
    total, cuts, start = sum(sizes.values()), {}, 0

    def cut(array: np.ndarray, first: int, last: int) -> np.ndarray:
        _check_rows(name, array, total)
        return array[first:last]

    for part, size in sizes.items():
        cuts[part] = lambda array, a=start, b=start + size: cut(array, a, b)
        start += size
    return cuts


def _check_rows(name: str, array: np.ndarray, rows: int) -> None:
    if array.ndim == 0 or array.shape[0] != rows:
        raise ConfigError(
            f"tensor {name} has shape {array.shape}; the configuration says {rows} rows"
        )


def _phi3(config: ModelConfig, names: Mapping[str, Any]) -> dict[str, tuple[str, Cut | None]]:
    kv = config.kv_heads * config.channels
    sizes = {"q_proj": config.num_heads * config.channels, "k_proj": kv, "v_proj": kv}
    gates = {"gate_proj": config.d_ff, "up_proj": config.d_ff}
    found: dict[str, tuple[str, Cut | None]] = {}
    for name in names:
        for fused, parts in (("qkv_proj.weight", sizes), ("gate_up_proj.weight", gates)):
            if name.endswith("." + fused):
                prefix = name.removesuffix(fused)
                cuts = _rows(name, parts)
                found |= {f"{prefix}{part}.weight": (name, cut) for part, cut in cuts.items()}
                break
        else:
            found[name] = (name, None)
    return found


def _neox(config: ModelConfig, names: Mapping[str, Any]) -> dict[str, tuple[str, Cut | None]]:
    found: dict[str, tuple[str, Cut | None]] = {}
    for name in names:
        if name in _NEOX_WHOLE:
            found[_NEOX_WHOLE[name]] = (name, None)
            continue
        if not name.startswith("gpt_neox.layers."):
            found[name] = (name, None)
            continue
        number, _, rest = name.removeprefix("gpt_neox.layers.").partition(".")
        if rest in _IGNORED or rest.endswith(_IGNORED[-1]):
            continue
        prefix = f"model.layers.{number}."
        part, _, kind = rest.rpartition(".")
        if part == "attention.query_key_value":
            for index, one in enumerate(_QKV):
                cut = _of_heads(name, config, index)
                found[f"{prefix}self_attn.{one}.{kind}"] = (name, cut)
        else:
            found[f"{prefix}{_NEOX.get(part, part)}.{kind}"] = (name, None)
    return found


def _of_heads(name: str, config: ModelConfig, index: int) -> Cut:
    heads, channels = config.num_heads, config.channels

    def cut(array: np.ndarray) -> np.ndarray:
        _check_rows(name, array, heads * 3 * channels)
        apart = array.reshape(heads, 3, channels, *array.shape[1:])
        return apart[:, index].reshape(heads * channels, *array.shape[1:])

    return cut


def from_llama(
    model_type: Any, config: ModelConfig, names: Iterable[str]
) -> dict[str, tuple[tuple[str, ...], Join]]:
    """How a family's tensors are made of those with Llama's names: theirs -> (parts, join)."""
    if model_type == "phi3":
        return dict(_joined_phi3(name) for name in names if _leads(name, "q_proj", "gate_proj"))
    if model_type == "gpt_neox":
        return dict(_joined_neox(config, name) for name in names if _leads(name, "q_proj"))
    return {name: ((name,), _alone) for name in names}


def _leads(name: str, *first: str) -> bool:
    """A part that is written for itself, or the first one of several that are joined."""
    parts = {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}
    return not any(f".{other}." in name for lead in first for other in parts[lead])


def _alone(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0]


def _joined_phi3(name: str) -> tuple[str, tuple[tuple[str, ...], Join]]:
    joined = {"q_proj": ("qkv_proj", _QKV), "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj"))}
    for lead, (fused, parts) in joined.items():
        if f".{lead}." in name:
            found = tuple(name.replace(lead, part) for part in parts)
            return name.replace(lead, fused), (found, np.concatenate)
    return name, ((name,), _alone)


def _joined_neox(config: ModelConfig, name: str) -> tuple[str, tuple[tuple[str, ...], Join]]:
    whole = {ours: theirs for theirs, ours in _NEOX_WHOLE.items()}
    if name in whole:
        return whole[name], ((name,), _alone)
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    prefix, (part, _, kind) = f"gpt_neox.layers.{number}.", rest.rpartition(".")
    if part != "self_attn.q_proj":
        own = {ours: theirs for theirs, ours in _NEOX.items()}
        return f"{prefix}{own.get(part, part)}.{kind}", ((name,), _alone)
    heads, channels = config.num_heads, config.channels

    def join(parts: list[np.ndarray]) -> np.ndarray:
        apart = [array.reshape(heads, channels, *array.shape[1:]) for array in parts]
        return np.stack(apart, axis=1).reshape(-1, *parts[0].shape[1:])

    found = tuple(name.replace("q_proj", one) for one in _QKV)
    return f"{prefix}attention.query_key_value.{kind}", (found, join)
