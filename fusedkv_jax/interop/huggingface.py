"""Import of Hugging Face checkpoints.

Only config.json and safetensors files are read; nothing is unpickled or executed.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.interop import lckv, own_format
from fusedkv_jax.interop import safetensors_folder as folders
from fusedkv_jax.interop.fused_tensors import as_llama
from fusedkv_jax.interop.huggingface_config import (
    config_from_huggingface,
    has_interleaved_rope,
    with_layout,
)
from fusedkv_jax.interop.huggingface_names import (
    Entry,
    places,
    their_shape,
    to_ours,
)
from fusedkv_jax.layouts import KVLayout, ordinary
from fusedkv_jax.model import Decoder
from fusedkv_jax.model.parameters import FusionWeight

OurPath = tuple[Any, ...]
_FLOATS = ("float16", "bfloat16", "float32", "float64")


class TensorError(ValueError):
    """Tensors that do not fit the configuration; the message names them."""


def load_huggingface(
    source: str | os.PathLike[str] | Mapping[str, Any],
    layout: KVLayout | str | None = None,
    *,
    config: ModelConfig | None = None,
    rope_interleave: bool | None = None,
    seed: int = 0,
) -> Decoder:
    """Build a decoder from a checkpoint's weights.

    With another layout than the checkpoint's, projections that it has no place for are left out,
    and its learned stream weights start as in a new model: a starting point for more training.

    Where the configuration ties the output head to the embedding but there is an `lm_head.weight`
    that differs from it, the head is not tied, as in transformers, and a warning says so.

    Args:
        source: folder with config.json and model.safetensors (or shards with their index), or the
            tensors by name.
        layout: layout of the decoder; by default that of `config`, or of the checkpoint.
        config: the configuration; by default that of the folder's config.json.
        rope_interleave: rotary pairs are stored as channels (2c, 2c + 1), and are reordered; by
            default as config.json says, without one for MLA only.
        seed: of the stream weights' initial values.

    Raises:
        ConfigError: an architecture or setting that is not supported.
        TensorError: tensors are missing or unknown, or have a wrong shape or type.
        FolderError: the folder cannot be read.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(source, Mapping):
            tensors, fields = source, None
            if config is None:
                raise ValueError("config is None; give it with tensors that are not in a folder")
        else:
            folder = Path(source)
            fields = folders.read_json(folder, "config.json")
            tensors = stack.enter_context(folders.open_folder(folder))
        stored = config = _config(fields or {}) if config is None else config
        if layout is not None:
            config = with_layout(config, layout)
        if fields is not None:
            tensors = as_llama(fields.get("model_type"), config, tensors)
        config = _untied_if_different(config, tensors)
        if own_format.is_own(fields) or lckv.is_theirs(fields):
            return _build(config, tensors, 0, seed, stored)
        if rope_interleave is None:
            known = fields is not None
            rope_interleave = has_interleaved_rope(fields) if known else config.mla is not None
        rotary = config.geometry.rotary if rope_interleave else 0
        return _build(config, tensors, rotary, seed)


def folder_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The configuration in a folder's config.json; raises as `load_huggingface`."""
    return _config(folders.read_json(Path(folder), "config.json"))


def is_own_format(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is in our own format, which `save_huggingface` writes where no family fits.

    Raises:
        FolderError: config.json cannot be read.
    """
    return own_format.is_own(folders.read_json(Path(folder), "config.json"))


def _config(fields: Mapping[str, Any]) -> ModelConfig:
    read = own_format.read if own_format.is_own(fields) else config_from_huggingface
    return read(fields)


def _abstract(config: ModelConfig) -> tuple[Any, dict[OurPath, nnx.Variable]]:
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return graph, dict(nnx.to_flat_state(state))


def _build(
    config: ModelConfig,
    tensors: Mapping[str, Any],
    interleaved: int,
    seed: int,
    stored: ModelConfig | None = None,
) -> Decoder:
    """The decoder; `stored` is the configuration of tensors in our own format."""
    graph, flat = _abstract(config)
    weighted = stored is not None and config.kv_layout == stored.kv_layout
    wanted = {
        path: places(config, path, own=weighted)
        for path, variable in flat.items()
        if weighted or not isinstance(variable, FusionWeight)
    }
    _check_names(
        config, tensors, {name for parts in wanted.values() for _, name, _ in parts}, stored
    )
    if len(wanted) < len(flat):
        flat |= _initial_fusion_weights(config, seed)
    for path, parts in wanted.items():
        stacked = flat[path].get_value()
        shape = stacked.shape if parts[0][0] is None else stacked.shape[1:]
        layers = [
            to_ours(entry, _tensor(tensors, name, entry, shape), shape, interleaved).astype(
                stacked.dtype
            )
            for _, name, entry in parts
        ]
        value = layers[0] if parts[0][0] is None else np.stack(layers)
        flat[path] = flat[path].replace(jnp.asarray(value))
    return nnx.merge(graph, nnx.from_flat_state(list(flat.items())))


def _untied_if_different(config: ModelConfig, tensors: Mapping[str, Any]) -> ModelConfig:
    """The configuration, untied if the tensors hold a head that is not the embedding."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if not config.tie_embeddings or not {embedding, head} <= set(tensors):
        return config
    if np.array_equal(np.asarray(tensors[embedding]), np.asarray(tensors[head])):
        return config
    warnings.warn(
        f"{head} differs from {embedding} although the configuration ties them; the head is loaded"
        " as it is, with tie_embeddings=False",
        stacklevel=3,
    )
    return config.replace(tie_embeddings=False)


def _initial_fusion_weights(config: ModelConfig, seed: int) -> dict[OurPath, nnx.Variable]:
    def draw() -> nnx.State:
        return nnx.state(Decoder(config, rngs=nnx.Rngs(seed)), FusionWeight)

    # Compiled, so that the parameters that are not asked for are never made.
    return dict(nnx.to_flat_state(jax.jit(draw)()))


def _tensor(
    tensors: Mapping[str, Any], name: str, entry: Entry, shape: tuple[int, ...]
) -> np.ndarray:
    array = np.asarray(tensors[name])
    expected = their_shape(entry, shape)
    if array.shape != expected:
        raise TensorError(
            f"tensor {name} has shape {array.shape}; the configuration says {expected}"
        )
    if array.dtype.name not in _FLOATS:
        raise TensorError(
            f"tensor {name} is {array.dtype.name}; use a checkpoint in {', '.join(_FLOATS[:3])}"
        )
    return array


def _check_names(
    config: ModelConfig, names: Iterable[str], wanted: set[str], stored: ModelConfig | None
) -> None:
    names = set(names)
    missing = sorted(wanted - names)
    if missing:
        raise TensorError(f"missing tensors: {_listing(missing)}; is the configuration right?")
    # Projections that this layout has no place for, a copy of the tied embedding, and the rotary
    # frequencies that old checkpoints hold.
    plain = with_layout(config, ordinary(config.num_layers)) if stored is None else stored
    known = {
        name
        for path in _abstract(plain)[1]
        for _, name, _ in places(plain, path, own=stored is not None)
    }
    known |= wanted | ({"lm_head.weight"} if config.tie_embeddings else set())
    unknown = sorted(n for n in names - known if not n.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise TensorError(
            f"unknown tensors: {_listing(unknown)}; the checkpoint has parts that the"
            " configuration does not"
        )


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
