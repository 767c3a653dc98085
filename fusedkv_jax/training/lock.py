"""One run per work directory: a lock that the kernel drops when the process dies."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator


class WorkdirLockedError(ValueError):
    """Another run is using the work directory."""


@contextlib.contextmanager
def lock_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """Hold the directory's lock inside the block.

    The lock is an advisory `flock` on `workdir/.lock`, so it is gone when the process ends in
    any way, kill -9 included; the file itself stays and means nothing.

    Raises:
      WorkdirLockedError: another process holds it; the message names that process.
    """
    with open(workdir / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise WorkdirLockedError(
                f"workdir {workdir} is in use by {owner}; wait for it to end, stop it, or pass "
                "another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield
