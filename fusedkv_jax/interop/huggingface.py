"""Import of Hugging Face checkpoints, and export.

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
from fusedkv_jax.interop import safetensors_folder as folders
from fusedkv_jax.interop.companions import copy_tokenizer
from fusedkv_jax.interop.export_config import config_to_huggingface
from fusedkv_jax.interop.fused_tensors import as_llama
from fusedkv_jax.interop.huggingface_config import (
    config_from_huggingface,
    has_interleaved_rope,
    with_layout,
)
from fusedkv_jax.interop.huggingface_names import (
    WHOLE,
    Entry,
    layer_entries,
    their_shape,
    to_ours,
    to_theirs,
)
from fusedkv_jax.layouts import KVLayout, ordinary, runs
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

    With another layout than `mha`, projections that the layout has no place for are left out, and
    its learned stream weights start as in a new model: a starting point for more training.

    Where the configuration ties the output head to the embedding but there is an `lm_head.weight`
    that differs from it, the head is not tied, as in transformers, and a warning says so.

    Args:
        source: folder with config.json and model.safetensors (or shards with their index), or the
            tensors by name.
        layout: layout of the decoder; by default that of `config`, or `mha`.
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
        if config is None:
            config = config_from_huggingface(fields or {})
        if layout is not None:
            config = with_layout(config, layout)
        if fields is not None:
            tensors = as_llama(fields.get("model_type"), config, tensors)
        config = _untied_if_different(config, tensors)
        if rope_interleave is None:
            known = fields is not None
            rope_interleave = has_interleaved_rope(fields) if known else config.mla is not None
        rotary = config.geometry.rotary if rope_interleave else 0
        return _build(config, tensors, rotary, seed)


def folder_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The configuration in a folder's config.json; raises as `load_huggingface`."""
    return config_from_huggingface(folders.read_json(Path(folder), "config.json"))


def save_huggingface(
    model: Decoder,
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a decoder that has its own keys and values in every layer as a folder of its family.

    config.json is written last: a folder without it is not complete.

    Args:
        model: the decoder.
        path: folder to write, new or empty.
        tokenizer: a tokenizer.json, or its folder, that is copied with what lies beside it.
        max_shard_bytes: largest weight file.

    Raises:
        ConfigError: transformers has no architecture for the model's configuration.
        FolderError: the folder is not empty.
    """
    fields = config_to_huggingface(model.config)
    folder = folders.new_folder(Path(path))
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
    sizes, places = {}, {}
    for our_path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = variable[...]
        for index, name, entry in _places(model.config, our_path):
            places[name] = (value, index, entry)
            sizes[name] = value.nbytes // (1 if index is None else value.shape[0])

    def tensor(name: str) -> np.ndarray:
        value, index, entry = places[name]
        return to_theirs(entry, np.asarray(value if index is None else value[index]))

    folders.write_tensors(folder, sizes, tensor, max_shard_bytes)
    folders.write_json(folder / "config.json", fields)


def _places(config: ModelConfig, path: OurPath) -> list[tuple[int | None, str, Entry]]:
    """(index on the stacked axis or None, their name, table entry) for one of our parameters."""
    if path[0] != "runs":
        entry = next(entry for entry in WHOLE if entry.ours == path)
        return [(None, entry.theirs, entry)]
    entry = layer_entries(config)[path[3:]]
    layers = runs(config.kv_layout)[path[1]].layers(path[2])
    return [(j, f"model.layers.{i}.{entry.theirs}", entry) for j, i in enumerate(layers)]


def _abstract(config: ModelConfig) -> tuple[Any, dict[OurPath, nnx.Variable]]:
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return graph, dict(nnx.to_flat_state(state))


def _build(config: ModelConfig, tensors: Mapping[str, Any], interleaved: int, seed: int) -> Decoder:
    graph, flat = _abstract(config)
    wanted = {
        path: _places(config, path)
        for path, variable in flat.items()
        if not isinstance(variable, FusionWeight)
    }
    _check_names(config, tensors, {name for places in wanted.values() for _, name, _ in places})
    if len(wanted) < len(flat):
        flat |= _initial_fusion_weights(config, seed)
    for path, places in wanted.items():
        stacked = flat[path].get_value()
        shape = stacked.shape if places[0][0] is None else stacked.shape[1:]
        layers = [
            to_ours(entry, _tensor(tensors, name, entry, shape), shape, interleaved).astype(
                stacked.dtype
            )
            for _, name, entry in places
        ]
        value = layers[0] if places[0][0] is None else np.stack(layers)
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
    def draw():
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


def _check_names(config: ModelConfig, names: Iterable[str], wanted: set[str]) -> None:
    names = set(names)
    missing = sorted(wanted - names)
    if missing:
        raise TensorError(f"missing tensors: {_listing(missing)}; is the configuration right?")
    # Projections that this layout has no place for, a copy of the tied embedding, and the rotary
    # frequencies that old checkpoints hold.
    plain = with_layout(config, ordinary(config.num_layers))
    known = {
        name
        for path, variable in _abstract(plain)[1].items()
        if not isinstance(variable, FusionWeight)
        for _, name, _ in _places(plain, path)
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
