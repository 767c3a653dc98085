"""What belongs to a model besides its weights: the files of its tokenizer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fusedkv_jax.data import tokenizers
from fusedkv_jax.interop.safetensors_folder import FolderError, checked_path, write_json

_TOKENIZER = "tokenizer.json"
_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def copy_tokenizer(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Copy a tokenizer and what lies beside it: special tokens, chat template, generation settings.

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
            shutil.copyfile(checked_path(place, beside), target / beside)


def write_generation_config(folder: Path) -> None:
    """Write generation_config.json, if it is missing: the ids of the tokenizer's special tokens.

    Args:
        folder: with the tokenizer.
    """
    path = folder / "generation_config.json"
    if path.exists():
        return
    tokenizer = tokenizers.load(str(folder))
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    write_json(path, {"_from_model_config": False, **ids})
