"""One run per work directory: a lock that the kernel drops when the process dies."""

import contextlib
import fcntl
import os
import pathlib
import re
from collections.abc import Iterator
from typing import IO

import jax

from fusedkv_jax import processes

_OWNER = re.compile(r"(process \d+ on \S*)?")


class WorkdirLockedError(ValueError):
    """Another run is using the work directory."""


@contextlib.contextmanager
def lock_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """Hold the directory's lock inside the block; process 0 holds it for all processes of a run.

    The lock is an advisory `flock` on `workdir/.lock`, so it is gone when the process ends in
    any way, kill -9 included; the file itself stays and means nothing.

    Args:
      workdir: made if it does not exist.

    Raises:
      WorkdirLockedError: another process holds it; the message names that process.
      ValueError: the file is not one of ours.
      ProcessesError: not all processes see the same directory.
    """
    with contextlib.ExitStack() as stack:

        def acquire() -> str:
            workdir.mkdir(parents=True, exist_ok=True)
            file = _file(workdir)
            if os.path.lexists(file) and not file.is_file():
                raise ValueError(f"{file} is no lock of a run; move it away")
            return _acquire(
                stack.enter_context(open(file, "a+", encoding="utf-8", errors="replace"))
            )

        owner = processes.on_first(acquire)
        processes.together(lambda: _check_shared(workdir, owner))
        yield


def _acquire(file: IO[str]) -> str:
    """Lock the open file and write into it who did; returns that text."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise WorkdirLockedError(
            f"workdir {pathlib.Path(file.name).parent} is in use by {owner}; wait for it to end, "
            "stop it, or pass another --workdir"
        ) from None
    file.seek(0)
    if not _OWNER.fullmatch(file.read(1000)):
        raise ValueError(f"{file.name} is no lock of a run; move it away")
    owner = f"process {os.getpid()} on {os.uname().nodename}"
    file.truncate(0)
    file.write(owner)
    file.flush()
    os.fsync(file.fileno())  # the other processes read it, perhaps over a network
    return owner


def _check_shared(workdir: pathlib.Path, owner: str) -> None:
    if processes.is_first():
        return
    try:
        found = _file(workdir).read_text(encoding="utf-8")
    except FileNotFoundError:
        found = ""
    if found != owner:
        raise processes.ProcessesError(
            f"process {jax.process_index()} does not see the workdir {workdir} of process 0; use "
            "a directory on a file system that all processes share"
        )


def _file(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / ".lock"
