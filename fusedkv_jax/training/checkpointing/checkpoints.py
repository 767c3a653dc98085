"""Checkpoints of a run with Orbax: asynchronous saving, exact resuming, clear refusals."""

import concurrent.futures
import dataclasses
import functools
import logging
import os
import pathlib
import re
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from fusedkv_jax import processes
from fusedkv_jax.model import Decoder
from fusedkv_jax.sharding import serving_shardings
from fusedkv_jax.training.checkpointing import manifest
from fusedkv_jax.training.checkpointing.compatibility import check_config, check_tree
from fusedkv_jax.training.checkpointing.directory import CheckpointDirectory, committed_steps
from fusedkv_jax.training.checkpointing.manifest import (
    CheckpointError,
    DamagedCheckpointError,
    FileEntry,
    Manifest,
)
from fusedkv_jax.training.checkpointing.tokenizer_files import kept_tokenizer
from fusedkv_jax.training.checkpointing.trees import plain, unplain, with_sharding
from fusedkv_jax.training.config import ExperimentConfig
from fusedkv_jax.training.state import TrainState, abstract_model
from fusedkv_jax.training.trainable import lora_of
from fusedkv_jax.validation import check_count, check_kind

BEST_METRIC = "eval/loss"
_absl = logging.getLogger("absl")
_CHANNEL = "checkpoints"  # of the decisions in the background
_Writing = tuple[pathlib.Path, Callable[[], None]]  # where to, and what waits for it


@runtime_checkable
class DataIterator(Protocol):
    """What a checkpoint keeps of the data: where they go on."""

    def get_state(self) -> dict[str, object]: ...

    def set_state(self, state: dict[str, object]) -> None: ...


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints/STEP`.

    A step holds two items: params (a plain nested dictionary of arrays) and optimizer (step,
    skipped, the optimizer's state), and the manifest, which has the place in the data stream, the
    configuration and every file's SHA-256. Saving happens in the background. Orbax writes to
    another name, the manifest follows, and a rename commits: a kill at any time leaves only whole
    checkpoints. Use as a context manager: leaving the block waits for the last save.

    A save that fails (the disk is full, say) is reported, and training goes on.

    With several processes each writes, hashes and reads its part; process 0 commits, reports and
    sets damaged steps aside. All must call the same methods in the same order.

    Args:
      workdir: the run's directory; made absolute, because Orbax writes relative paths in a
        background thread, where they fail without a word.
      keep: number of newest checkpoints kept.
      keep_best: number of checkpoints kept besides, those with the lowest `BEST_METRIC`.
      report: takes a line about what went wrong.
    """

    def __init__(
        self,
        workdir: pathlib.Path | str,
        keep: int,
        *,
        keep_best: int = 0,
        report: Callable[[str], object] = print,
    ) -> None:
        check_count("keep", keep)
        check_count("keep_best", keep_best, least=0)
        self._directory = CheckpointDirectory(
            checkpoint_directory(workdir), keep, keep_best, BEST_METRIC
        )
        processes.on_first(self._directory.clean)
        self._report = report
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future | None = None

    @property
    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        return processes.on_first(lambda: max(self._directory.steps(), default=None))

    def save(
        self,
        step: int,
        state: TrainState,
        data: DataIterator,
        config: ExperimentConfig,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Start saving; does nothing if this step is already there.

        Args:
          step: the step that the state belongs to.
          state: may be donated right after the call.
          data: the iterator, which may go on right after the call. Its state must not
            depend on the process, as that of `make_train_iterator` does not.
          config: stored with the checkpoint.
          metrics: the last evaluation's values, stored with the checkpoint.
        """
        self.wait()
        if step == self.latest_step:
            return
        items = {"params": plain(state.params), "optimizer": _optimizer_item(state)}
        write = functools.partial(
            manifest.write,
            step=step,
            config=config.to_dict(),
            metrics=metrics or {},
            data=data.get_state(),
        )
        path: pathlib.Path | None = None
        started: _Writing | Exception
        try:
            path = pathlib.Path(processes.on_first(lambda: str(self._directory.unfinished(step))))
            started = path, ocp.save_checkpointables_async(str(path), items).result
        except Exception as error:  # of any kind: a run outlives its checkpoints
            if path is not None and jax.process_count() > 1:
                raise  # the other processes are inside a collective of Orbax
            started = error
        # Also after a failure: the other processes wait to hear of it.
        self._pending = self._thread.submit(self._finish, step, started, write)

    def _finish(
        self, step: int, started: _Writing | Exception, write: Callable[..., Manifest]
    ) -> None:
        """Commit what all processes have written, or report the first failure of one."""
        path: pathlib.Path | None = None
        files: dict[str, FileEntry] = {}
        failure = None
        try:
            if isinstance(started, Exception):
                raise started
            path, wait = started
            wait()
            files = manifest.hash_files(path)
        except Exception as error:
            failure = error

        def commit(outcomes: list[tuple[Exception | None, dict[str, FileEntry]]]) -> None:
            for failure, shared in outcomes:
                if failure is not None:
                    raise failure
                files.update(shared)
            assert path is not None  # or there was a failure
            # The manifest is the last file: what has none was never whole. And only the rename
            # makes the step one that `restore` looks at, so a kill in between leaves nothing.
            write(path, files=files)
            self._directory.commit(step, path)
            try:
                self._directory.prune()
            except OSError as error:
                self._tell(
                    f"warning: step {step} is saved, but not all checkpoints before it that are no"
                    f" longer wanted could be removed: {_reason(error)}"
                )

        try:
            processes.decide((failure, files), commit, _CHANNEL)
        except Exception as error:
            self._failed(step, error)

    def _failed(self, step: int, error: Exception) -> None:
        if processes.is_first():
            self._directory.discard(step)  # the disk may be full
        self._tell(
            f"warning: step {step} could not be saved and training goes on: {_reason(error)}"
        )

    def _tell(self, line: str) -> None:
        if processes.is_first():
            self._report(line)

    def restore(
        self, abstract: TrainState, data: DataIterator, config: ExperimentConfig
    ) -> tuple[TrainState, int] | None:
        """The newest intact checkpoint's state; the data iterator is moved to its place.

        A damaged checkpoint is reported, set aside as `STEP.damaged`, and the one before is used.

        Args:
          abstract: shapes and dtypes of the state, from `abstract_state`.
          data: a fresh iterator of `config.data`.
          config: the run's configuration, which the checkpoint must agree with.

        Returns:
          (state, step), or None if nothing was ever saved.

        Raises:
          CheckpointError: another model or other data (the message names the first parameter or
            setting that differs), or all checkpoints are damaged.
          ValueError: the source's documents have changed.
        """
        damaged = []
        for step in reversed(processes.on_first(self._directory.steps)):
            path = self._directory.path / str(step)
            try:
                saved = processes.together(lambda: manifest.verify(path, share=True))  # noqa: B023
            except DamagedCheckpointError as damage:
                aside = processes.on_first(lambda: self._directory.set_aside(step).name)  # noqa: B023
                self._tell(f"warning: {damage}; set aside as {aside}")
                damaged.append(str(damage))
                continue
            return self._load(path, saved, abstract, data, config), step
        if damaged:
            raise CheckpointError(
                f"{damaged[0]}, and no other checkpoint in {self._directory.path} is intact; "
                "restore the directory from a copy, or use another --workdir to start again"
            )
        return None

    def _load(
        self,
        path: pathlib.Path,
        saved: Manifest,
        abstract: TrainState,
        data: DataIterator,
        config: ExperimentConfig,
    ) -> TrainState:
        if not any(name.startswith("optimizer/") for name in saved.files):
            raise CheckpointError(
                f"checkpoint {path} is a converted model without an optimizer's state; start from "
                "it in another --workdir, with --init_from"
            )
        expected = {"params": plain(abstract.params), "optimizer": _optimizer_item(abstract)}
        check_tree(path, saved.config, expected, config)
        check_config(path, saved.config, config)
        loaded = ocp.load_checkpointables(str(path), with_sharding(expected))
        processes.together(lambda: data.set_state(saved.data))
        rest = loaded["optimizer"]
        return TrainState(
            step=rest["step"],
            skipped=rest["skipped"],
            recent=rest["recent"],
            params=unplain(abstract.params, loaded["params"]),
            opt_state=unplain(abstract.opt_state, rest["opt_state"]),
        )

    def wait(self) -> None:
        """Wait for the running save."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "Checkpoints":
        _absl.addFilter(_is_not_of_orbax)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.wait()
        self._thread.shutdown()
        _absl.removeFilter(_is_not_of_orbax)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Leaves out Orbax's tracebacks of an error that it also raises and that we report."""
    return f"orbax{os.sep}checkpoint" not in record.pathname


def _reason(error: Exception) -> str:
    """The cause in a line; Orbax hides the system's among paths and counts, or hands it on."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number:
        return os.strerror(int(number[1]))
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def checkpoint_directory(workdir: pathlib.Path | str) -> pathlib.Path:
    """Where the checkpoints of a work directory lie, as an absolute path."""
    return pathlib.Path(workdir).expanduser().resolve() / "checkpoints"


def save_model(model: Decoder, config: ExperimentConfig, workdir: pathlib.Path | str) -> None:
    """Make a work directory of a model that was not trained there: step 0, without an optimizer.

    `load_model` reads it; training starts from it with `train --init_from`, in another directory.

    Args:
      model: the model, `config.model` its configuration.
      config: stored with it, without LoRA, whose changes are the model's own by now.
      workdir: made if it does not exist.

    Raises:
      CheckpointError: there are checkpoints already.
    """
    check_kind("model", model, Decoder, "a Decoder")
    check_kind("config", config, ExperimentConfig, "an ExperimentConfig")
    config = _without_lora(config)
    directory = checkpoint_directory(workdir)
    if directory.exists():
        raise CheckpointError(f"{workdir} has checkpoints; use another directory")
    saved = CheckpointDirectory(directory, 1, 0, BEST_METRIC)
    path = saved.unfinished(0)
    ocp.save_checkpointables(str(path), {"params": plain(nnx.state(model, nnx.Param))})
    files = manifest.hash_files(path)
    manifest.write(path, step=0, config=config.to_dict(), metrics={}, data={}, files=files)
    saved.commit(0, path)


def load_model(
    workdir: pathlib.Path | str, step: int | None = None, mesh: Mesh | None = None
) -> tuple[Decoder, ExperimentConfig, int]:
    """The trained model of a work directory, for evaluation, generation and conversion.

    Args:
      workdir: directory that `train` wrote to; a run in progress may go on writing.
      step: which checkpoint; None takes the newest.
      mesh: where the parameters go, split over it; None for the default device.

    Returns:
      (model, configuration of the run, step). `data.tokenizer` is the copy in the work directory
      where there is one. LoRA's changes are added to the model's matrices, and the configuration
      speaks of none.

    Raises:
      CheckpointError: no checkpoint there, or none of that step, or a file of it is damaged.
      TokenizerChangedError: a file of the tokenizer's copy is damaged.
    """
    directory = checkpoint_directory(workdir)
    steps = committed_steps(directory)
    if not steps:
        raise CheckpointError(f"there is no checkpoint in {workdir}; train there first")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise CheckpointError(
            f"step={step} is not in {workdir}, which has {', '.join(map(str, steps))}"
        )
    path = directory / str(step)
    saved = manifest.verify(path, below="params/").config
    config = ExperimentConfig.from_dict(saved)
    tokenizer = kept_tokenizer(config.data.tokenizer, workdir)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
    graphdef, params = abstract_model(config.model)
    lora = lora_of(config)
    if lora is not None:
        params = jax.eval_shape(lora.add, params, 0)
    expected = {"params": plain(params)}
    check_tree(path, saved, expected, config)
    shardings = None if mesh is None else serving_shardings(expected, mesh)
    loaded = ocp.load_checkpointables(str(path), with_sharding(expected, shardings))
    params = unplain(params, loaded["params"])
    if lora is not None:
        params, config = lora.merge(params), _without_lora(config)
    return nnx.merge(graphdef, params), config, step


def _without_lora(config: ExperimentConfig) -> ExperimentConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, lora_rank=0))


def _optimizer_item(state: TrainState) -> dict[str, PyTree]:
    return {
        "step": state.step,
        "skipped": state.skipped,
        "recent": state.recent,
        "opt_state": plain(state.opt_state),
    }
