"""The directory of a run's checkpoints: a step appears whole, by a rename, or not at all."""

import os
import pathlib
import shutil

from fusedkv_jax.training import manifest
from fusedkv_jax.training.manifest import CheckpointError

_DAMAGED = ".damaged"


class Store:
    """`directory/STEP` for each committed step; everything else there is unfinished or set aside.

    Args:
      directory: absolute path; made when the first step is saved.
      keep: number of newest steps kept.
      keep_best: number of further steps kept, those with the lowest `best_metric`.
      best_metric: a name in the manifests' metrics.
    """

    def __init__(self, directory: pathlib.Path, keep: int, keep_best: int, best_metric: str):
        self.directory = directory
        self._keep, self._keep_best, self._best_metric = keep, keep_best, best_metric

    def steps(self) -> list[int]:
        """The committed steps, oldest first."""
        return committed_steps(self.directory)

    def clean(self) -> None:
        """Remove what interrupted saves and removals have left."""
        for path in self.directory.glob("*"):
            is_step = path.name.isdecimal() or path.name.endswith(_DAMAGED)
            if path.is_dir() and not is_step:
                shutil.rmtree(path, ignore_errors=True)

    def unfinished(self, step: int) -> pathlib.Path:
        """Where to write a step before it is committed."""
        self.discard(step)
        self.directory.mkdir(parents=True, exist_ok=True)
        return self.directory / f"{step}.unfinished"

    def discard(self, step: int) -> None:
        """Remove what was written of a step that will not be committed."""
        for path in self.directory.glob(f"{step}.unfinished*"):
            shutil.rmtree(path, ignore_errors=True)

    def commit(self, step: int) -> None:
        """Make a step visible, then remove the steps that are no longer wanted."""
        os.rename(self.directory / f"{step}.unfinished", self.directory / str(step))
        _sync(self.directory)
        self._prune()

    def set_aside(self, step: int) -> pathlib.Path:
        """Keep a damaged step for inspection, out of the way."""
        aside = self.directory / f"{step}{_DAMAGED}"
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(self.directory / str(step), aside)
        return aside

    def _prune(self) -> None:
        steps = self.steps()
        wanted = set(steps[-self._keep :])
        if self._keep_best:
            values = {step: self._value(step) for step in steps}
            ranked = [step for step in steps if values[step] is not None]
            ranked.sort(key=lambda step: (values[step], step))
            wanted |= set(ranked[: self._keep_best])
        for step in steps:
            if step not in wanted:
                # Renamed first: a reader sees a whole checkpoint or none.
                gone = self.directory / f"{step}.removed"
                os.rename(self.directory / str(step), gone)
                shutil.rmtree(gone, ignore_errors=True)

    def _value(self, step: int) -> float | None:
        try:
            return manifest.read(self.directory / str(step)).metrics.get(self._best_metric)
        except CheckpointError:
            return None  # restoring will say what is wrong with it


def committed_steps(directory: pathlib.Path) -> list[int]:
    """The steps in a directory of checkpoints, oldest first."""
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdecimal() and p.is_dir())


def _sync(directory: pathlib.Path) -> None:
    """Force a directory's entries to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
