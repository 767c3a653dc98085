"""Sources: from what the user names (files, globs, folders, python_stdlib) to documents."""

import dataclasses
import glob
import itertools
import math
import pathlib
import stat
import sysconfig
from collections.abc import Iterator, Sequence

from fusedkv_jax.data import formats
from fusedkv_jax.validation import nearest_names

PYTHON_STDLIB = "python_stdlib"
RECALL = "recall"  # synthetic tasks, which are made and not read
SHARD_SUFFIXES = (".arrayrecord", ".array_record")
# Folders of the standard library that hold tests, other packages or generated files.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def mixture(source: str) -> list[tuple[str, float]]:
    """The sources that one name stands for, with their weights.

    "web,0.7;code,0.3" names two; any other name one, of weight 1.

    Raises:
      ValueError: a weight that is missing or not positive, or a source that cannot be mixed.
    """
    if ";" not in source:
        return [(source, 1.0)]
    return [_weighted(part.strip(), source) for part in source.split(";")]


def _weighted(part: str, source: str) -> tuple[str, float]:
    name, _, text = part.rpartition(",")
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight) or weight <= 0:
        raise ValueError(
            f"data source {source!r}: {part!r} is no part of a mixture; write SOURCE,WEIGHT with a "
            "weight above 0, as in 'web,0.7;code,0.3'"
        )
    if name == RECALL:
        raise ValueError(
            f"data source {source!r}: {RECALL!r} is made, not read, and cannot be mixed"
        )
    return name, weight


def absolute(source: str) -> str:
    """The source under a name that means the same in any directory."""
    if ";" in source:
        return ";".join(f"{absolute(name)},{weight:g}" for name, weight in mixture(source))
    if source in (PYTHON_STDLIB, RECALL):
        return source
    return str(pathlib.Path(source).expanduser().absolute())


def list_files(inputs: Sequence[str]) -> list[pathlib.Path]:
    """Expands files, globs, folders and "python_stdlib" to the files to read, in a fixed order.

    The order is that of `inputs`; within a folder or glob, sorted by path. A file that is named
    several times, in whatever spelling or by a link, is read once, under the first name. Hidden
    files, and in folders files of unknown type, are skipped.

    Raises:
      FileNotFoundError: an input names nothing. ValueError: a folder without usable files.
    """
    if not inputs:
        raise ValueError("no input: name at least one file, glob or folder")
    names: dict[pathlib.Path, pathlib.Path] = {}
    for file in itertools.chain.from_iterable(map(_expand, inputs)):
        names.setdefault(file.resolve(), file)
    return list(names.values())


def is_shard(path: pathlib.Path) -> bool:
    """Whether a file name is that of an ArrayRecord shard."""
    return path.suffix.lower() in SHARD_SUFFIXES


def read_all(
    files: Sequence[pathlib.Path],
    *,
    text_key: str = "text",
    errors: str = "strict",
    max_bytes: int = formats.MAX_DOCUMENT_BYTES,
) -> Iterator[formats.Document]:
    """Yields the documents of `files` one after the other, without the empty ones.

    Their `bytes_read` count on from file to file. Raises as `formats.read_documents`.
    """
    before = 0
    for path in files:
        for document in formats.read_documents(
            path, text_key=text_key, errors=errors, max_bytes=max_bytes
        ):
            if document.text:
                yield dataclasses.replace(document, bytes_read=before + document.bytes_read)
        before += path.stat().st_size


def _expand(name: str) -> list[pathlib.Path]:
    if name == PYTHON_STDLIB:
        return _stdlib_files()
    path = pathlib.Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _folder_files(path)
    if glob.has_magic(name):
        found = [pathlib.Path(match) for match in glob.glob(str(path), recursive=True)]
        files = [match for match in _sorted(found) if match.is_file()]
        if not files:
            raise FileNotFoundError(f"no file matches {name!r}")
        return files
    problem = why_not_a_file(path)
    if problem:
        raise ValueError(f"{name}: {problem}")
    raise FileNotFoundError(f"no such file or folder: {name!r}{_hint(name, path)}")


def why_not_a_file(path: pathlib.Path) -> str | None:
    """What a name stands for if it is neither a file nor a folder; None if for nothing at all."""
    try:
        mode = path.stat().st_mode
    except OSError:
        if path.is_symlink():
            return f"is a broken link, to {str(path.readlink())!r}"
        return None
    for is_kind, kind in _SPECIAL_FILES.items():
        if is_kind(mode):
            return f"is a {kind}, which cannot be read twice; write its content to a file"
    return None


_SPECIAL_FILES = {
    stat.S_ISFIFO: "pipe (FIFO)",
    stat.S_ISSOCK: "socket",
    stat.S_ISCHR: "device",
    stat.S_ISBLK: "device",
}


def _folder_files(folder: pathlib.Path) -> list[pathlib.Path]:
    found = []
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not (is_shard(path) or formats.format_of(path)):
            continue
        problem = why_not_a_file(path)
        if problem:
            raise ValueError(f"{path}: {problem}")
        if path.is_file():
            found.append(path)
    if any(is_shard(path) for path in found):
        # A folder of shards also holds their metadata, which is not text to train on.
        found = [path for path in found if is_shard(path)]
    if not found:
        raise ValueError(f"{folder}: the folder has no text, JSON, Parquet or ArrayRecord files")
    return _sorted(found)


def _stdlib_files() -> list[pathlib.Path]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts[:-1]
        if not _NOT_STDLIB.intersection(parts):
            found.append(path)
    if not found:
        raise ValueError(f"{PYTHON_STDLIB}: this interpreter has no .py files in {root}")
    return _sorted(found)


def _sorted(paths: list[pathlib.Path]) -> list[pathlib.Path]:
    return sorted(paths, key=lambda path: path.as_posix())


def _hint(name: str, path: pathlib.Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = [PYTHON_STDLIB, *(entry.name for entry in path.parent.iterdir())]
    near = nearest_names(pathlib.Path(name).name, names)
    return f"; did you mean {near[0]!r}?" if near else ""
