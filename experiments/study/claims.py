"""Workers side by side: who works on a cell holds a lock that the kernel drops when it dies."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def claim(path: pathlib.Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a claim inside the block, if no other process does; yields whether this one has it.

    The claim is an advisory `flock`, so it ends with its process in any way, kill -9 included, and
    a worker that is stopped (SIGSTOP) keeps it. The file stays and means nothing by itself.

    Args:
      path: the file; its folder is made.
      wait: until it is free, instead of yielding False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
