"""The manifest of a checkpoint: what it is, and the SHA-256 of every file, so damage has a name."""

import concurrent.futures
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax

from fusedkv_jax.training.monitoring.metrics import finite_or_none
from fusedkv_jax.validation import build

FILE = "manifest.json"
FORMAT = 4
_OLD_FORMAT = 3  # the same fields; the digest was a last line after the JSON
_PACKAGES = ("fusedkv_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")

FileEntry = list[Any]  # bytes and SHA-256, a list as JSON has it


class CheckpointError(ValueError):
    """A checkpoint is missing, or is not one of this configuration."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is not what was written; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What was saved.

    Attributes:
      step: the training step.
      config: the run's whole configuration, as a dictionary.
      metrics: the last evaluation's values at that step; None where one is not finite.
      data: the place in the data stream, the same number for any number of processes.
      versions: of Python and the packages that wrote it.
      files: relative path -> [bytes, SHA-256 in hexadecimal].
    """

    step: int
    config: dict[str, object]
    metrics: dict[str, float | None]
    data: dict[str, object]
    versions: dict[str, str]
    files: dict[str, FileEntry]
    format: int = FORMAT

    @property
    def nbytes(self) -> int:
        """Size of the files together, in bytes."""
        return sum(size for size, _ in self.files.values())


def hash_files(directory: pathlib.Path) -> dict[str, FileEntry]:
    """Hash this process's share of the files below a directory, and force them to disk.

    Together the processes hash every file once, most of them where they were written.

    Returns:
      relative path -> [bytes, SHA-256 in hexadecimal].
    """
    names = [name for name in list_files(directory) if _is_ours(name)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda name: _digest(directory / name, sync=True), names))
    return {
        name: [(directory / name).stat().st_size, digest]
        for name, digest in zip(names, digests, strict=True)
    }


def write(
    directory: pathlib.Path,
    *,
    step: int,
    config: dict[str, object],
    metrics: Mapping[str, float | None],
    data: dict[str, object],
    files: dict[str, FileEntry],
) -> Manifest:
    """Write the manifest of a directory, and force it to disk.

    Args:
      directory: of the checkpoint.
      step, config, metrics, data: as in `Manifest`.
      files: what `hash_files` returned on all processes.
    """
    metrics = finite_or_none(metrics)  # JSON has no other numbers
    manifest = Manifest(
        step=step, config=config, metrics=metrics, data=data, versions=_versions(), files=files
    )
    with open(directory / FILE, "wb") as file:
        file.write(_serialize(asdict(manifest)))
        file.flush()
        os.fsync(file.fileno())
    return manifest


def read(directory: pathlib.Path) -> Manifest:
    """The manifest of a checkpoint, itself protected by a digest.

    Raises:
      CheckpointError: there is none, or another version wrote it.
      DamagedCheckpointError: it is not what was written.
    """
    try:
        if not stat.S_ISREG((directory / FILE).stat().st_mode):
            raise OSError("not a regular file")  # a pipe would be waited for
        content = (directory / FILE).read_bytes()
    except OSError as error:
        found = "has no" if isinstance(error, FileNotFoundError) else "has an unreadable"
        raise DamagedCheckpointError(
            f"checkpoint {directory} {found} {FILE}: it was changed, or this is not a checkpoint "
            "of fusedkv_jax"
        ) from None
    fields = _fields(content)
    if fields is None:
        raise DamagedCheckpointError(f"checkpoint {directory} is damaged: {FILE} was changed")
    if fields.get("format") not in (FORMAT, _OLD_FORMAT):
        raise CheckpointError(
            f"checkpoint {directory} has format {fields.get('format')}, and this version of "
            f"fusedkv_jax reads {FORMAT}; restore it with the version that wrote it"
        )
    try:
        return build(Manifest, fields, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(
            f"checkpoint {directory}: {error}; restore it with the version that wrote it"
        ) from None


def _fields(content: bytes) -> dict[str, object] | None:
    """The fields of a manifest file; None unless they are as they were written."""
    body, _, last = content.removesuffix(b"\n").rpartition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() == last:  # the old format
        return json.loads(body)
    try:
        fields = json.loads(content)["manifest"]
        return fields if content == _serialize(fields) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _serialize(fields: dict[str, object]) -> bytes:
    """JSON, with the SHA-256 of the fields in their shortest form beside them."""
    shortest = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    document = {"manifest": fields, "sha256": hashlib.sha256(shortest.encode()).hexdigest()}
    return (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def verify(directory: pathlib.Path, below: str = "", *, share: bool = False) -> Manifest:
    """Compare every file with the manifest.

    Args:
      directory: of the checkpoint.
      below: look at paths that start with this only, such as "params/"; by default at all.
      share: look at this process's share only; all processes must then do so, and agree.

    Returns:
      The manifest.

    Raises:
      DamagedCheckpointError: a file is missing, was changed, or does not belong there. The
        message names the first one.
    """
    manifest = read(directory)
    found = set(list_files(directory))
    wanted = sorted(
        name
        for name in manifest.files.keys() | found
        if name.startswith(below) and (_is_ours(name) or not share)
    )
    for name in wanted:
        if name not in found:
            raise DamagedCheckpointError(f"checkpoint {directory} is damaged: {name} is missing")
        if name not in manifest.files:
            raise DamagedCheckpointError(
                f"checkpoint {directory} is damaged: {name} does not belong to it"
            )
        size, right = (directory / name).stat().st_size, manifest.files[name][0]
        if size != right:
            raise DamagedCheckpointError(
                f"checkpoint {directory} is damaged: {name} has {size} bytes instead of {right}"
            )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = pool.map(_digest, [directory / name for name in wanted])
        for name, digest in zip(wanted, digests, strict=True):
            if digest != manifest.files[name][1]:
                raise DamagedCheckpointError(
                    f"checkpoint {directory} is damaged: the content of {name} was changed"
                )
    return manifest


def list_files(directory: pathlib.Path) -> list[str]:
    """The files below a checkpoint but its manifest, as sorted relative paths."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return [path.relative_to(directory).as_posix() for path in paths if path.name != FILE]


def _is_ours(name: str) -> bool:
    """Whether a file is in this process's share: what it wrote; process 0 takes what is nobody's.

    Orbax ends the names of the files and directories that only process N writes in `process_N`.
    A network file system shows them to others some time later.
    """
    writer = re.search(r"process_(\d+)(/|$)", name)
    return (int(writer[1]) if writer else 0) % jax.process_count() == jax.process_index()


def _digest(path: pathlib.Path, sync: bool = False) -> str:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
