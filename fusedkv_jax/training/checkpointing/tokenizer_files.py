"""The tokenizer of a run, kept in its work directory: what the ids mean must not change later.

`workdir/tokenizer` holds copies of `tokenizer.json` and of what lies beside it, with their hashes
in `SHA256SUMS` (`sha256sum -c` verifies them). So a run can be resumed, evaluated and talked to
from any directory, and after the original has moved or changed.
"""

import hashlib
import pathlib
import shutil
import tempfile

from fusedkv_jax.data import tokenizers
from fusedkv_jax.data.chat import TEMPLATE_FILE, TOOL_TEMPLATE_FILE

FOLDER = "tokenizer"
SUMS = "SHA256SUMS"
_FILES = ("tokenizer.json", "tokenizer_config.json", TEMPLATE_FILE, TOOL_TEMPLATE_FILE)
_BYTE = tokenizers.ByteTokenizer.name


class TokenizerChangedError(ValueError):
    """A tokenizer is not the one that a run was trained with."""


def kept_tokenizer(name: str, workdir: pathlib.Path | str) -> str:
    """What to load a run's tokenizer by: the copy in its work directory where there is one.

    Args:
      name: `data.tokenizer` of the run's configuration.
      workdir: of the run.

    Raises:
      TokenizerChangedError: a file of the copy is not what was written.
    """
    folder = pathlib.Path(workdir).expanduser().resolve() / FOLDER
    if name == _BYTE or not (folder / SUMS).is_file():
        return name
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, file = line.partition("  ")
        if file not in _FILES or _digest(folder / file) != digest:
            raise TokenizerChangedError(
                f"{folder}: {file!r} is not as it was when the run began; restore it"
            )
    return str(folder)


def keep_tokenizer(name: str, workdir: pathlib.Path) -> str:
    """Copy a tokenizer into the work directory of a run that has none; otherwise compare them.

    Args:
      name: "byte", or the path of a `tokenizer.json` or its folder.
      workdir: of the run, absolute; exists.

    Returns:
      What to load it by, as `kept_tokenizer`.

    Raises:
      TokenizerChangedError: the run began with another one.
      ValueError: something else has the name of the copy.
    """
    kept = kept_tokenizer(name, workdir)
    if name == _BYTE:
        return name
    if not (workdir / FOLDER / SUMS).is_file():
        _copy(pathlib.Path(name).expanduser(), workdir / FOLDER)
        return kept_tokenizer(name, workdir)
    if pathlib.Path(name).expanduser().exists():
        given, ours = tokenizers.load(name), tokenizers.load(kept)
        same = ("fingerprint", "bos_id", "eos_id")
        if any(getattr(given, field) != getattr(ours, field) for field in same):
            raise TokenizerChangedError(
                f"tokenizer {name!r} (sha256 {given.fingerprint[:12]}) is not the one that the run "
                f"in {workdir} began with (sha256 {ours.fingerprint[:12]}), which is kept in "
                f"{kept}; give that one, or another --workdir"
            )
    return kept


def _copy(source: pathlib.Path, folder: pathlib.Path) -> None:
    if folder.exists():
        raise ValueError(f"{folder} is no tokenizer that a run has kept; move it away")
    file = source / "tokenizer.json" if source.is_dir() else source
    files = {name: file.parent / name for name in _FILES} | {_FILES[0]: file}
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = pathlib.Path(temporary, FOLDER)
        sums = ""
        for name, path in files.items():
            if path is file or path.is_file():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, new / name)
                sums += f"{_digest(new / name)}  {name}\n"
        (new / SUMS).write_text(sums, encoding="utf-8")
        new.rename(folder)  # all of it, or none


def _digest(path: pathlib.Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
