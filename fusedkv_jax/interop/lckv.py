"""Llama checkpoints whose layers share keys and values: LCKV's, and those of YOCO++ after it.

`model_type` is `lckv-llama` in both code bases (arXiv 2410.14442 and YOCO++). `layer_types`
says whose keys and values each layer reads; the later one's `method` says how.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fusedkv_jax import layouts
from fusedkv_jax.config import ConfigError
from fusedkv_jax.layouts import KVLayout, LayerKV, Mixing, Stream

MODEL_TYPE = "lckv-llama"
_METHODS = ("yoco", "yoco-plus", "fusedkv", "fusedkv-lite")


def is_theirs(fields: Mapping[str, Any] | None) -> bool:
    """Whether a config.json is of these code bases."""
    return fields is not None and fields.get("model_type") == MODEL_TYPE


def layout_of(fields: Mapping[str, Any]) -> KVLayout:
    """The layout that a config.json describes.

    Raises:
        ConfigError: it is one that we cannot compute.
        LayoutError: `layer_types` cannot be read.
    """
    if fields.get("force_nodiag"):
        raise ConfigError(
            "config.json: force_nodiag, no token attending to itself in any layer, is not supported"
        )
    count = fields["num_hidden_layers"]
    types = fields.get("layer_types") or "_".join(map(str, range(count)))
    # Theirs has fewer words than our grammar, which could name very many layers in a short text.
    if not isinstance(types, str) or not re.fullmatch(r"\d{1,5}s?(_\d{1,5}s?)*", types):
        raise ConfigError("config.json: layer_types must be numbers of layers, such as 0_1_1s")
    if types.count("_") + 1 != count:
        raise ConfigError(f"config.json: {types.count('_') + 1} layer_types for {count} layers")
    passes = fields.get("forward_passes", 7), fields.get("backward_passes", 2)
    window = fields.get("sliding_window") or 4096
    layout = layouts.parse(types, window=window, passes=passes)
    method = fields.get("method") or "yoco"
    if method not in _METHODS:
        raise ConfigError(f"config.json: method={method!r}; choose {', '.join(_METHODS)}")
    if method == "yoco":
        return layout
    scale = float(fields.get("scaling_factor") or 35.0)
    found = [_changed(method, i, layer, scale) for i, layer in enumerate(layout.layers)]
    return dataclasses.replace(layout, layers=tuple(found), spec="")


def _changed(method: str, i: int, layer: LayerKV, scale: float) -> LayerKV:
    if method == "yoco-plus":
        if i == 0 or not layer.caches:
            return layer
        mixing = Mixing(init="own", scale=scale)
        residual = Stream(own=True, sources=(0,), weights="scalar", mixing=mixing)
        return dataclasses.replace(layer, key=residual, value=residual)
    if layer.caches:
        return layer
    if method == "fusedkv-lite":
        return dataclasses.replace(layer, value=layouts.reuse(0))
    (source,) = layer.key.sources
    fused = Stream(sources=(0, source), weights="shared_channel")
    return dataclasses.replace(layer, key=fused, value=fused)


class OwnNames(Mapping[str, Any]):
    """The tensors with stream weights under the names of our own format."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    def __iter__(self) -> Iterator[str]:
        for name in self._tensors:
            if name.endswith(("key_weight", "value_weight")):
                yield name + "s"
            elif not name.endswith(("key_weight0", "value_weight0")):
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> np.ndarray:
        if not name.endswith(("key_weights", "value_weights")):
            return np.asarray(self._tensors[name])
        upper = np.asarray(self._tensors[name[:-1]])
        if name[:-1] + "0" not in self._tensors:
            return upper  # YOCO++: of layer 0 and of the layer itself
        weights = np.stack([np.asarray(self._tensors[name[:-1] + "0"]), upper])
        # One weight stands for both channels of a rotary pair, in values too.
        return weights if name.endswith("key_weights") else np.concatenate([weights] * 2, -1)
