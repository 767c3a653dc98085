"""Folders of safetensors files as the Hugging Face hub lays them out: read lazily, write in shards.

Nothing is unpickled, and a name found in a file never leads out of the folder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class FolderError(ValueError):
    """A model folder that cannot be read or written; the message names the file and the fix."""


def checked_path(folder: Path, name: str) -> Path:
    """The file `name` directly inside `folder`.

    Raises:
        FolderError: the name leads elsewhere, is a symbolic link, or there is no such file.
    """
    if name != Path(name).name or "\\" in name or name == "..":
        raise FolderError(f"{folder}: file name {name!r} leads out of the folder; refused")
    path = folder / name
    if path.is_symlink() and not _in_hub_cache(path):
        raise FolderError(
            f"{path} is a symbolic link that leads out of the folder; refused; copy the files, for"
            " example with `hf download --local-dir`"
        )
    if path.exists() and not path.is_file():
        raise FolderError(f"{path} is not a regular file; is {folder} a complete model folder?")
    if not path.is_file():
        if not folder.is_dir():
            problem = "is a file" if folder.exists() else "does not exist"
            raise FolderError(f"{folder} {problem}; name a model folder or a .gguf file")
        raise FolderError(f"{path} does not exist; is {folder} a complete model folder?")
    return path


def _in_hub_cache(path: Path) -> bool:
    """A link of the hub's cache, from MODEL/snapshots/REVISION to MODEL/blobs/HASH; from the
    revision's folder, or from one within it.
    """
    for snapshots in path.parent.resolve().parents[:2]:
        if snapshots.name == "snapshots":
            return path.resolve().parent == snapshots.parent / "blobs"
    return False


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object from the folder."""
    path = checked_path(folder, name)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FolderError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise FolderError(f"{path} is JSON that is nested too deeply") from None
    if not isinstance(value, dict):
        raise FolderError(f"{path} holds no JSON object")
    return value


class TensorFolder(Mapping[str, Any]):
    """The tensors of a folder by name, each read from disk when it is asked for."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._files: dict[str, Any] = {}
        if (folder / _SINGLE).exists():  # goes before the index, as in transformers
            self._place = dict.fromkeys(self._file(_SINGLE).keys(), _SINGLE)
        elif (folder / _INDEX).exists():
            weight_map = read_json(folder, _INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(file, str) for file in weight_map.values()
            ):
                raise FolderError(f"{folder / _INDEX} has no weight_map of file names")
            self._place = weight_map
        else:
            raise FolderError(
                f"{folder} has neither {_SINGLE} nor {_INDEX}; only safetensors are read"
            )

    def _file(self, name: str) -> Any:
        if name not in self._files:
            path = checked_path(self._folder, name)
            try:
                opened = safetensors.safe_open(path, framework="numpy")
                self._files[name] = self._stack.enter_context(opened)
            except (safetensors.SafetensorError, OSError) as error:
                raise FolderError(f"{path} is not a readable safetensors file: {error}") from None
        return self._files[name]

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._place[name]
        try:
            return self._file(file).get_tensor(name)
        except safetensors.SafetensorError as error:
            raise FolderError(f"{self._folder / file}: tensor {name}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[TensorFolder]:
    """Open a folder's tensors; its files are closed at the end of the block."""
    with contextlib.ExitStack() as stack:
        yield TensorFolder(folder, stack)


def new_folder(folder: Path) -> Path:
    """Make a folder to write to.

    Raises:
        FolderError: it is a file, or a folder with something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{folder} exists and is not an empty folder; choose another path")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_tensors(
    folder: Path,
    sizes: Mapping[str, int],
    tensor: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Write tensors to one file, or to shards with an index.

    Args:
        folder: where to.
        sizes: bytes of every tensor, in the order to write.
        tensor: gives a tensor by name; called once for each, one shard's are held at a time.
        max_shard_bytes: bytes in one file; a larger tensor gets a file of its own.
    """
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = _SINGLE if len(shards) == 1 else file
        # transformers refuses files without this note; it means [out, in] linear layers.
        arrays = {name: tensor(name) for name in names}
        safetensors.numpy.save_file(arrays, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / _INDEX, index)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object for people to read."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
