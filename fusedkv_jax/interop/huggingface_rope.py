"""The rotary settings of a config.json, as transformers reads them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fusedkv_jax.config import ConfigError, RopeConfig
from fusedkv_jax.model.rotary import yarn_temperature

_PARTIAL = ("phi3", "gpt_neox")  # families whose heads may turn a part of their channels
_KINDS = ("full_attention", "sliding_attention")


def required(fields: Mapping[str, Any], name: str) -> Any:
    """A field that has no default.

    Raises:
        ConfigError: it is missing, or null.
    """
    if fields.get(name) is None:
        raise ConfigError(f"config.json has no {name}; is it a complete model configuration?")
    return fields[name]


def ropes(fields: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig | None]:
    """That of layers with full attention, and that of windowed ones if it is told apart.

    Raises:
        ConfigError: one that we cannot compute.
    """
    scaling, parameters = (_object(fields, name) for name in ("rope_scaling", "rope_parameters"))
    if fields["model_type"] == "gemma3_text":
        return _gemma3(fields, scaling, parameters)
    rope = scaling or parameters
    if any(kind in rope for kind in _KINDS):
        raise ConfigError("config.json: rope_parameters for kinds of layers; only Gemma 3 has them")
    return _rope(fields, rope), None


def _object(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = fields.get(name) or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"config.json: {name}={found!r} is no object")
    return found


def _gemma3(
    fields: Mapping[str, Any], scaling: Mapping[str, Any], parameters: Mapping[str, Any]
) -> tuple[RopeConfig, RopeConfig]:
    """One for each kind of layer; `rope_scaling` is of those with full attention."""
    if set(parameters) - set(_KINDS) or set(scaling) & set(_KINDS):
        raise ConfigError(
            "config.json: rope_parameters of Gemma 3 are full_attention and sliding_attention only"
        )
    if scaling:
        required(scaling, "rope_type")  # by "type", its old name, transformers 4 and 5 differ
    full, windowed = (_object(parameters, kind) for kind in _KINDS)
    common = {name: fields.get(name) for name in ("model_type", "max_position_embeddings")}
    common["partial_rotary_factor"] = fields.get("partial_rotary_factor")
    thetas = fields.get("rope_theta", 1_000_000.0), fields.get("rope_local_base_freq", 10_000.0)
    return (
        _rope(common | {"rope_theta": thetas[0]}, {**full, **scaling}),
        _rope(common | {"rope_theta": thetas[1]}, windowed),
    )


def _rope(fields: Mapping[str, Any], rope: Mapping[str, Any]) -> RopeConfig:
    model_type = fields["model_type"]
    neox = model_type == "gpt_neox"
    share = rope.get("partial_rotary_factor")
    if share is None:
        share = fields.get("rotary_pct" if neox else "partial_rotary_factor")
    share = 1.0 if share is None else share
    if share != 1 and model_type not in _PARTIAL:
        raise ConfigError(
            f"config.json: partial_rotary_factor={share}; {model_type} turns all channels, use 1"
        )
    theta = fields.get("rotary_emb_base" if neox else "rope_theta", 10_000.0)
    theta = required({"rope_theta": theta, **rope}, "rope_theta")
    return dataclasses.replace(_full_rope(fields, rope, theta), fraction=share)


def _full_rope(fields: Mapping[str, Any], rope: Mapping[str, Any], theta: float) -> RopeConfig:
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
    if kind != "yarn" and "deepseek" in fields["model_type"] and rope.get("mscale_all_dim"):
        raise ConfigError(f"config.json: mscale_all_dim with rope_type={kind!r}; only yarn's is")
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=required(rope, "factor"))
    longest = required(fields, "max_position_embeddings")
    original = fields.get("original_max_position_embeddings")
    original = original or rope.get("original_max_position_embeddings") or longest
    common: dict[str, Any] = dict(theta=theta, original_length=original)
    common["factor"] = rope.get("factor") or longest / original
    if kind == "llama3":
        return RopeConfig(
            scaling="llama3",
            low_freq_factor=required(rope, "low_freq_factor"),
            high_freq_factor=required(rope, "high_freq_factor"),
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
