"""What belongs to a model besides its weights: the files of its tokenizer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fusedkv_jax.data import tokenizers
from fusedkv_jax.data.chat import TEMPLATE_FILE, TOOL_TEMPLATE_FILE
from fusedkv_jax.interop.safetensors_folder import (
    FolderError,
    checked_path,
    read_json,
    write_json,
)

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_BESIDE = (
    _CONFIG,
    "special_tokens_map.json",
    TEMPLATE_FILE,
    TOOL_TEMPLATE_FILE,
    "generation_config.json",
)


def copy_tokenizer(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Copy a tokenizer and what lies beside it: special tokens, templates, generation settings.

    Args:
        source: a tokenizer.json, or its folder.
        folder: where to, made if it does not exist.

    Raises:
        FolderError: there is no tokenizer.json, or a file is a link that leads elsewhere.
    """
    place = Path(source).expanduser()
    place, name = (place, _TOKENIZER) if place.is_dir() else (place.parent, place.name)
    if not (place / name).exists():
        raise FolderError(f"{place} has no {name}; name the model's tokenizer, or 'byte'")
    found, target = checked_path(place, name), Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found, target / _TOKENIZER)
    for beside in _BESIDE:
        if (place / beside).is_file():
            copy = target / beside
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(checked_path((place / beside).parent, copy.name), copy)


def complete_tokenizer_config(folder: Path) -> None:
    """Add to tokenizer_config.json what it does not say: the class, and the special tokens.

    Without a class transformers takes that of the model's family, which for some cuts texts by
    the family's own rules and adds the family's special tokens.

    Args:
        folder: with the tokenizer.
    """
    tokenizer, path = tokenizers.HuggingFaceTokenizer(folder), folder / _CONFIG
    entries = read_json(folder, _CONFIG) if path.exists() else {}
    ids = {"eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    if tokenizer.bos_id != tokenizer.eos_id:  # else it stands for a BOS that there is not
        ids["bos_token"] = tokenizer.bos_id
    found = {name: tokenizer.token(number) for name, number in ids.items() if number is not None}
    if entries.get("eos_token", "") is None:
        del entries["eos_token"]
    write_json(path, {"tokenizer_class": "PreTrainedTokenizerFast", **found, **entries})


def write_generation_config(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Write generation_config.json, if it is missing: the ids of the tokenizer's special tokens."""
    path = folder / "generation_config.json"
    if path.exists():
        return
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    write_json(path, {"_from_model_config": False, **ids})
