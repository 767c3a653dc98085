"""Export: a model as a Hugging Face folder, of its family where it has one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from fusedkv_jax.config import ConfigError, ModelConfig
from fusedkv_jax.data import tokenizers
from fusedkv_jax.interop import own_format
from fusedkv_jax.interop import safetensors_folder as folders
from fusedkv_jax.interop.companions import (
    complete_tokenizer_config,
    copy_tokenizer,
    write_generation_config,
)
from fusedkv_jax.interop.export_config import config_to_huggingface
from fusedkv_jax.interop.fused_tensors import from_llama
from fusedkv_jax.interop.huggingface_names import places, to_theirs
from fusedkv_jax.interop.model_card import model_card
from fusedkv_jax.model import Decoder
from fusedkv_jax.validation import check_count, check_kind


def save_huggingface(
    model: Decoder,
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    facts: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a decoder as a Hugging Face folder, with a model card.

    A model that one of transformers' architectures computes becomes a folder of that family. Any
    other is written in our own format, whose config.json names the layout, with the PyTorch file
    that computes it (`pytorch/modeling_fusedkv.py`, which is copied and never run here).
    `load_huggingface` reads both. config.json is written last: a folder without it is not complete.

    Args:
        model: the decoder.
        path: folder to write, new or empty.
        tokenizer: a tokenizer.json, or its folder, that is copied with what lies beside it; or
            "byte", which has no file.
        facts: what else the model card says, by name: data, tokens, measured figures.
        max_shard_bytes: largest weight file.

    Raises:
        FolderError: the folder is not empty.
    """
    check_kind("model", model, Decoder, "a Decoder")
    check_count("max_shard_bytes", max_shard_bytes)
    folder = folders.new_folder(Path(path))
    if tokenizer == "byte":
        write_generation_config(folder, tokenizers.load("byte"))
    elif tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
        complete_tokenizer_config(folder)
        write_generation_config(folder, tokenizers.load(str(folder)))
    fields = _fields(model.config)
    own = own_format.is_own(fields)
    _write_tensors(model, folder, fields["model_type"], own, max_shard_bytes)
    if own:
        shutil.copyfile(own_format.MODELING, folder / own_format.MODELING.name)
    card = model_card(model.config, fields["model_type"], own, facts or {})
    (folder / "README.md").write_text(card, encoding="utf-8")
    folders.write_json(folder / "config.json", fields)


def _fields(config: ModelConfig) -> dict[str, Any]:
    """config.json."""
    try:
        return config_to_huggingface(config)
    except ConfigError:  # no family has it
        return own_format.write(config)


def _write_tensors(
    model: Decoder, folder: Path, model_type: str, own: bool, max_shard_bytes: int
) -> None:
    sizes, found = {}, {}
    for our_path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = variable[...]
        for index, name, entry in places(model.config, our_path, own):
            found[name] = (value, index, entry)
            sizes[name] = value.nbytes // (1 if index is None else value.shape[0])
    written = from_llama(model_type, model.config, sizes)

    def tensor(name: str) -> np.ndarray:
        parts, join = written[name]
        return join([part(each) for each in parts])

    def part(name: str) -> np.ndarray:
        value, index, entry = found[name]
        return to_theirs(entry, np.asarray(value if index is None else value[index]))

    together = {name: sum(sizes[each] for each in parts) for name, (parts, _) in written.items()}
    folders.write_tensors(folder, together, tensor, max_shard_bytes)
