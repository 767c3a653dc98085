"""Where programs write: known to be writable before the work, whole or not there after it."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterable, Iterator
from typing import Any


def check_output(path: str | os.PathLike[str], *, folder: bool = False) -> pathlib.Path:
    """The path of an output, once it is known that it can be written: before the work, not after.

    Args:
      path: a file, or a folder; what is missing of the folders above it is created.
      folder: whether it is one.

    Raises:
      ValueError: a file is where a folder should be, or the other way round.
      OSError: it cannot be written.
    """
    if not os.fspath(path):
        raise ValueError("the name of an output is empty; name a folder or file")
    path = pathlib.Path(path).expanduser()
    above = path if folder else path.parent
    if above.exists() and not above.is_dir():
        raise ValueError(f"{str(above)!r} is a file; name a folder")
    if above.is_symlink() and not above.exists():
        raise ValueError(f"{str(above)!r} is a link to what does not exist; name a folder")
    above.mkdir(parents=True, exist_ok=True)
    if not folder and path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; name a file")
    existed = path.exists()
    if not folder and path.is_fifo():  # would be waited for
        raise ValueError(f"{str(path)!r} is a pipe; name a file")
    probe = path / f".write-test-{os.getpid()}" if folder else path
    with open(probe, "ab"):
        pass
    if folder or not existed:
        probe.unlink()
    return path


def check_results_file(path: pathlib.Path) -> pathlib.Path:
    """The path of a results file that a program may write or replace; see `check_output`.

    Raises:
      ValueError: what is there is not a document of these programs, and would be lost.
    """
    check_output(path)
    if path.exists() and path.stat().st_size:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            document = None
        if not isinstance(document, dict) or not {"experiment", "environment"} <= document.keys():
            raise ValueError(f"{str(path)!r} was written by something else; move it away")
    return path


def check_new_folder(name: str, output: pathlib.Path, inputs: Iterable[str] = ()) -> None:
    """Refuse an output folder that holds something, or lies within what is read.

    Args:
      name: of the setting, for the message.
      output: the folder.
      inputs: what is read; folders among them must stay as they are.

    Raises:
      ValueError: it is a file, is not empty, or lies within an input.
    """
    for each in inputs:
        source = pathlib.Path(each).expanduser()
        if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"{name} {output} is within the input {each}; name another folder")
    if output.is_symlink() and not output.exists():
        raise ValueError(f"{name} {output} is a link to what does not exist; name a folder")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{name} {output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{name} {output} is not empty; name a new folder or remove it")


@contextlib.contextmanager
def complete_folder(name: str, output: pathlib.Path) -> Iterator[pathlib.Path]:
    """A hidden folder beside the output, which gets its name when all is written.

    It is removed if anything fails, Ctrl-C included: what is found under the name is complete.

    Args:
      name: of the setting, for messages.
      output: the folder, new or empty.
    """
    output = output.resolve()
    work = output.with_name(f".{output.name}.{uuid.uuid4().hex}.tmp")
    work.mkdir(parents=True)
    try:
        yield work
        check_new_folder(name, output)
        work.rename(output)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextlib.contextmanager
def resumable_folder(
    name: str, output: pathlib.Path, plan: dict[str, Any]
) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Two hidden folders beside the output: for the work, and for what gets the output's name.

    What is in them stays when the program is killed, interrupted or out of disk space, and the
    next call finds it. A ValueError, which is about what is read, removes all.

    Args:
      name: of the setting, for messages.
      output: the folder, new or empty.
      plan: what the work depends on, as JSON.

    Raises:
      ValueError: the work was begun with another plan, or another process is at it.
    """
    output = output.resolve()
    place = output.with_name(f".{output.name}.unfinished")
    work, made = place / "work", place / "made"
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{name} {output} is being written by another process; wait for its end"
            ) from None
        _keep_plan(f"{name} {output}", place, made, plan)
        try:
            yield work, made
        except ValueError:
            shutil.rmtree(place, ignore_errors=True)
            raise
        check_new_folder(name, output)
        shutil.rmtree(work)
        made.rename(output)
        shutil.rmtree(place, ignore_errors=True)


def _keep_plan(output: str, place: pathlib.Path, made: pathlib.Path, plan: dict[str, Any]) -> None:
    file, text, work = place / "plan.json", json.dumps(plan), place / "work"
    if not made.is_dir():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        file.write_text(text, encoding="utf-8")
        made.mkdir()
        return
    old = json.loads(file.read_text(encoding="utf-8"))
    changed = [key for key, value in json.loads(text).items() if old.get(key) != value]
    if changed:
        raise ValueError(
            f"{output} was begun with other {' and '.join(changed)} and is not finished; repeat "
            f"that command, or remove {place}"
        )
