"""Checkpoints of a run with Orbax: asynchronous saving, exact resuming, clear refusals."""

import concurrent.futures
import json
import pathlib
from collections.abc import Callable
from typing import Any

from flax import nnx
from orbax.checkpoint import v1 as ocp

from fusedkv_jax.model import Decoder
from fusedkv_jax.training import manifest
from fusedkv_jax.training.config import ExperimentConfig, first_difference
from fusedkv_jax.training.manifest import CheckpointError, DamagedCheckpointError, Manifest
from fusedkv_jax.training.state import TrainState, abstract_model
from fusedkv_jax.training.store import Store, committed_steps
from fusedkv_jax.training.trees import describe, plain, unplain, with_sharding

# Settings that change how the model is computed but neither its parameters nor its function.
MODEL_RUNTIME_FIELDS = ("attention", "max_length", "remat", "scan_layers")
# Settings that change how fast batches come but not which.
DATA_RUNTIME_FIELDS = ("num_threads", "prefetch_batches")
BEST_METRIC = "eval/loss"


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints/STEP`.

    A step holds three items: params (a plain nested dictionary of arrays), optimizer (step,
    skipped, the optimizer's state) and data (the place in the data stream), and the manifest,
    which has the configuration and every file's SHA-256. Saving happens in the background. Orbax
    writes to another name, the manifest follows, and a rename commits: a kill at any time leaves
    only whole checkpoints. Use as a context manager: leaving the block waits for the last save.

    A save that fails (the disk is full, say) is reported, and training goes on.

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
        report: Callable[[str], Any] = print,
    ):
        self._store = Store(checkpoint_directory(workdir), keep, keep_best, BEST_METRIC)
        self._store.clean()
        self._report = report
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future | None = None

    @property
    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        return max(self._store.steps(), default=None)

    def save(
        self,
        step: int,
        state: TrainState,
        data: Any,
        config: ExperimentConfig,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Start saving; does nothing if this step is already there.

        Args:
          step: the step that the state belongs to.
          state: may be donated right after the call.
          data: the Grain iterator, which may go on right after the call.
          config: stored with the checkpoint.
          metrics: the last evaluation's values, stored with the checkpoint.
        """
        self.wait()
        if step == self.latest_step:
            return
        items = {"params": plain(state.params), "optimizer": _optimizer_item(state), "data": data}
        description = {"step": step, "config": config.to_dict(), "metrics": metrics or {}}
        try:
            path = self._store.unfinished(step)
            writing = ocp.save_checkpointables_async(str(path), items)
        except Exception as error:  # of any kind: a run outlives its checkpoints
            self._failed(step, error)
            return
        self._pending = self._thread.submit(self._finish, step, writing, path, description)

    def _finish(self, step: int, writing: Any, path: pathlib.Path, description: dict) -> None:
        try:
            writing.result()
            manifest.write(path, **description)
            self._store.commit(step)
        except Exception as error:
            self._failed(step, error)

    def _failed(self, step: int, error: Exception) -> None:
        reason = (str(error).splitlines() or [""])[0]
        self._report(
            f"warning: step {step} could not be saved and training goes on: "
            f"{type(error).__name__}: {reason}"
        )

    def restore(
        self, abstract: TrainState, data: Any, config: ExperimentConfig
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
        """
        damaged = []
        for step in reversed(self._store.steps()):
            path = self._store.directory / str(step)
            try:
                saved = manifest.verify(path)
            except DamagedCheckpointError as damage:
                aside = self._store.set_aside(step)
                self._report(f"warning: {damage}; set aside as {aside.name}")
                damaged.append(str(damage))
                continue
            return self._load(path, saved, abstract, data, config), step
        if damaged:
            raise CheckpointError(
                f"{damaged[0]}, and no other checkpoint in {self._store.directory} is intact; "
                "restore the directory from a copy, or use another --workdir to start again"
            )
        return None

    def _load(
        self,
        path: pathlib.Path,
        saved: Manifest,
        abstract: TrainState,
        data: Any,
        config: ExperimentConfig,
    ) -> TrainState:
        expected = {"params": plain(abstract.params), "optimizer": _optimizer_item(abstract)}
        _check_tree(path, saved.config, expected, config)
        _check_config(path, saved.config, config)
        loaded = ocp.load_checkpointables(str(path), {**with_sharding(expected), "data": data})
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
        return self

    def __exit__(self, *exc_info) -> None:
        self.wait()
        self._thread.shutdown()


def checkpoint_directory(workdir: pathlib.Path | str) -> pathlib.Path:
    """Where the checkpoints of a work directory lie, as an absolute path."""
    return pathlib.Path(workdir).expanduser().resolve() / "checkpoints"


def load_model(
    workdir: pathlib.Path | str, step: int | None = None
) -> tuple[Decoder, ExperimentConfig, int]:
    """The trained model of a work directory, for evaluation, generation and conversion.

    Args:
      workdir: directory that `train` wrote to; a run in progress may go on writing.
      step: which checkpoint; None takes the newest.

    Returns:
      (model, configuration of the run, step).

    Raises:
      CheckpointError: no checkpoint there, or none of that step, or a file of it is damaged.
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
    graphdef, params = abstract_model(config.model)
    expected = {"params": plain(params)}
    _check_tree(path, saved, expected, config)
    loaded = ocp.load_checkpointables(str(path), with_sharding(expected))
    return nnx.merge(graphdef, unplain(params, loaded["params"])), config, step


def _check_tree(
    path: pathlib.Path, saved: dict[str, Any], expected: dict[str, Any], config: ExperimentConfig
) -> None:
    """Compare names, shapes and dtypes ourselves.

    Orbax reports any difference as an "incompatible handler", and casts dtypes silently.
    """
    for item, tree in expected.items():
        wanted = describe(tree)
        found = describe(ocp.metadata(str(path), checkpointable_name=item).metadata)
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) == found.get(name):
                continue
            cause = _difference("model", saved, config)
            raise CheckpointError(
                f"checkpoint {path} is of another model: {item}/{name} is "
                f"{found.get(name, 'missing')} there and {wanted.get(name, 'missing')} here"
                + (f" ({cause})" if cause else "")
                + "; use the configuration it was trained with, or another --workdir"
            )


def _check_config(path: pathlib.Path, saved: dict[str, Any], config: ExperimentConfig) -> None:
    cause = _difference("model", saved, config) or _difference("data", saved, config)
    if cause:
        raise CheckpointError(
            f"checkpoint {path} was made with another setting, {cause}; set it back, or use "
            "another --workdir"
        )


def _difference(part: str, saved: dict[str, Any], config: ExperimentConfig) -> str | None:
    """The first setting of "model" or "data" that differs and matters."""
    runtime = MODEL_RUNTIME_FIELDS if part == "model" else DATA_RUNTIME_FIELDS
    old, new = (
        {name: value for name, value in values[part].items() if name not in runtime}
        for values in (saved, json.loads(json.dumps(config.to_dict())))
    )
    return first_difference(old, new, part)


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "skipped": state.skipped,
        "recent": state.recent,
        "opt_state": plain(state.opt_state),
    }
