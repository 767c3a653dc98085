"""The manifest of a checkpoint: what it is, and the SHA-256 of every file, so damage has a name."""

import concurrent.futures
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
from dataclasses import asdict, dataclass
from typing import Any

FILE = "manifest.json"
FORMAT = 2
_PACKAGES = ("fusedkv_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


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
      metrics: the last evaluation's values at that step.
      versions: of Python and the packages that wrote it.
      files: relative path -> [bytes, SHA-256 in hexadecimal].
    """

    step: int
    config: dict[str, Any]
    metrics: dict[str, float]
    versions: dict[str, str]
    files: dict[str, list[Any]]
    format: int = FORMAT

    @property
    def nbytes(self) -> int:
        """Size of the files together, in bytes."""
        return sum(size for size, _ in self.files.values())


def write(
    directory: pathlib.Path, *, step: int, config: dict[str, Any], metrics: dict[str, float]
) -> Manifest:
    """Hash every file below a directory, force them all to disk, and add the manifest."""
    paths = _files(directory)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = list(pool.map(functools.partial(_digest, sync=True), paths))
    files = {
        path.relative_to(directory).as_posix(): [path.stat().st_size, digest]
        for path, digest in zip(paths, digests, strict=True)
    }
    manifest = Manifest(
        step=step, config=config, metrics=metrics, versions=_versions(), files=files
    )
    body = json.dumps(asdict(manifest), indent=1, sort_keys=True)
    with open(directory / FILE, "w", encoding="utf-8") as file:
        file.write(f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n")
        file.flush()
        os.fsync(file.fileno())
    return manifest


def read(directory: pathlib.Path) -> Manifest:
    """The manifest of a checkpoint, itself protected by the digest in its last line.

    Raises:
      CheckpointError: there is none, or another version wrote it.
      DamagedCheckpointError: it is not what was written.
    """
    path = directory / FILE
    try:
        body, _, digest = path.read_bytes().removesuffix(b"\n").rpartition(b"\n")
    except FileNotFoundError:
        raise DamagedCheckpointError(
            f"checkpoint {directory} has no {FILE}: it was deleted, or this is not a checkpoint of "
            "fusedkv_jax"
        ) from None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise DamagedCheckpointError(f"checkpoint {directory} is damaged: {FILE} was changed")
    fields = json.loads(body)
    if fields.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {directory} has format {fields.get('format')}, and this version of "
            f"fusedkv_jax reads {FORMAT}; restore it with the version that wrote it"
        )
    return Manifest(**fields)


def verify(directory: pathlib.Path, below: str = "") -> Manifest:
    """Compare every file with the manifest.

    Args:
      directory: of the checkpoint.
      below: look at paths that start with this only, such as "params/"; by default at all.

    Returns:
      The manifest.

    Raises:
      DamagedCheckpointError: a file is missing, was changed, or does not belong there. The
        message names the first one.
    """
    manifest = read(directory)
    found = {path.relative_to(directory).as_posix(): path for path in _files(directory)}
    for name in sorted(manifest.files.keys() | found.keys()):
        if not name.startswith(below):
            continue
        if name not in found:
            raise DamagedCheckpointError(f"checkpoint {directory} is damaged: {name} is missing")
        if name not in manifest.files:
            raise DamagedCheckpointError(
                f"checkpoint {directory} is damaged: {name} does not belong to it"
            )
        size, wanted = found[name].stat().st_size, manifest.files[name][0]
        if size != wanted:
            raise DamagedCheckpointError(
                f"checkpoint {directory} is damaged: {name} has {size} bytes instead of {wanted}"
            )
    names = [name for name in sorted(manifest.files) if name.startswith(below)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = pool.map(_digest, [found[name] for name in names])
        for name, digest in zip(names, digests, strict=True):
            if digest != manifest.files[name][1]:
                raise DamagedCheckpointError(
                    f"checkpoint {directory} is damaged: the content of {name} was changed"
                )
    return manifest


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != FILE]


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
