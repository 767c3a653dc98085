"""The directory of a run's checkpoints: a step appears whole, by a rename, or not at all.

What others put there stays: only what bears this module's mark in its name, or is a file that the
manifest of a checkpoint lists, is ever removed.
"""

import contextlib
import os
import pathlib
import re
import shutil
import uuid

from fusedkv_jax.training.checkpointing import manifest
from fusedkv_jax.training.checkpointing.manifest import CheckpointError

_STEP = re.compile(r"0|[1-9][0-9]*")
_MARK = "fusedkv_jax"
_REMOVED = re.compile(rf"(?:{_STEP.pattern})\.removed-{_MARK}-[0-9a-f]{{32}}")
# Orbax writes to a name with a suffix of its own and renames it when all files are there.
_UNFINISHED = re.compile(
    rf"(?P<step>{_STEP.pattern})\.unfinished-{_MARK}-[0-9a-f]{{32}}(?:\.orbax-checkpoint-tmp.*)?"
)


class CheckpointDirectory:
    """`path/STEP` for each committed step; everything else there is unfinished or set aside.

    Args:
      path: absolute; made when the first step is saved.
      keep: number of newest steps kept.
      keep_best: number of further steps kept, those with the lowest `best_metric`.
      best_metric: a name in the manifests' metrics.
    """

    def __init__(self, path: pathlib.Path, keep: int, keep_best: int, best_metric: str) -> None:
        self.path = path
        self._keep, self._keep_best, self._best_metric = keep, keep_best, best_metric

    def steps(self) -> list[int]:
        """The committed steps, oldest first."""
        return committed_steps(self.path)

    def clean(self) -> None:
        """Remove what interrupted saves and removals have left, as far as it can be removed."""
        for path in self.path.glob("*"):
            if _UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
            elif _REMOVED.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    _remove(path)

    def unfinished(self, step: int) -> pathlib.Path:
        """A new path to write a step to before it is committed; no other may be under way."""
        self.clean()  # of a save that failed too: its threads may have outlived `discard`
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path / _marked(step, "unfinished")

    def discard(self, step: int) -> None:
        """Remove what was written of a step that will not be committed."""
        for path in self.path.glob("*"):
            match = _UNFINISHED.fullmatch(path.name)
            if match and int(match["step"]) == step:
                shutil.rmtree(path, ignore_errors=True)

    def commit(self, step: int, unfinished: pathlib.Path) -> None:
        """Make a step visible.

        Raises:
          FileExistsError: there is something of that name already; it stays.
        """
        place = self.path / str(step)
        if os.path.lexists(place):
            raise FileExistsError(f"{place} is there already; move it away")
        os.rename(unfinished, place)
        _sync(self.path)

    def set_aside(self, step: int) -> pathlib.Path:
        """Keep a damaged step for inspection, out of the way."""
        number, aside = 1, self.path / f"{step}.damaged"
        while os.path.lexists(aside):
            number += 1
            aside = self.path / f"{step}.damaged-{number}"
        os.rename(self.path / str(step), aside)
        return aside

    def prune(self) -> None:
        """Remove the steps that are no longer wanted.

        Raises:
          OSError: one of them cannot be removed; the others are.
        """
        failure = None
        values = {}
        for step in self.steps():
            try:
                saved = manifest.read(self.path / str(step))
            except CheckpointError:
                continue  # not ours, or damaged: restoring will say so
            if saved.step == step:
                values[step] = saved.metrics.get(self._best_metric)
        wanted = set(list(values)[-self._keep :])
        if self._keep_best:
            ranked = [step for step in values if values[step] is not None]
            ranked.sort(key=lambda step: (values[step], step))
            wanted |= set(ranked[: self._keep_best])
        for step in values.keys() - wanted:
            # Renamed first: a reader sees a whole checkpoint or none.
            gone = self.path / _marked(step, "removed")
            try:
                os.rename(self.path / str(step), gone)
                _remove(gone)
            except OSError as error:
                failure = error
        if failure is not None:
            raise failure


def committed_steps(directory: pathlib.Path) -> list[int]:
    """The steps in a directory of checkpoints, oldest first."""
    return sorted(
        int(path.name)
        for path in directory.glob("*")
        if _STEP.fullmatch(path.name) and path.is_dir()
    )


def _marked(step: int, kind: str) -> str:
    """A name that nobody else has chosen, so that what bears it may be removed."""
    return f"{step}.{kind}-{_MARK}-{uuid.uuid4().hex}"


def _remove(checkpoint: pathlib.Path) -> None:
    """Remove the files that a checkpoint's manifest lists, the manifest last, and what is empty.

    A file that somebody has put there stays, in its directory.
    """
    try:
        ours = manifest.read(checkpoint).files.keys()
    except CheckpointError:
        ours = set()  # they were removed before
    for name in ours & set(manifest.list_files(checkpoint)):
        (checkpoint / name).unlink()
    if ours:
        (checkpoint / manifest.FILE).unlink()
    for folder, _, _ in os.walk(checkpoint, topdown=False):
        try:
            os.rmdir(folder)
        except OSError:
            continue  # not empty


def _sync(directory: pathlib.Path) -> None:
    """Force a directory's entries to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
