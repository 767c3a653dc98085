"""Checkpoints of a run with Orbax: asynchronous saving, exact resuming, clear refusals."""

import json
import pathlib
from typing import Any

from flax import nnx
from orbax.checkpoint import v1 as ocp

from fusedkv_jax.model import Decoder
from fusedkv_jax.training.config import ExperimentConfig, first_difference
from fusedkv_jax.training.state import TrainState, abstract_model
from fusedkv_jax.training.trees import describe, plain, unplain, with_sharding

FORMAT = 1
# Settings that change how the model is computed but neither its parameters nor its function.
MODEL_RUNTIME_FIELDS = ("attention", "max_length", "remat", "scan_layers")
# Settings that change how fast batches come but not which.
DATA_RUNTIME_FIELDS = ("num_threads", "prefetch_batches")


class CheckpointError(ValueError):
    """A checkpoint is missing, or is not one of this configuration."""


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints/STEP`.

    A step holds three items: params (a plain nested dictionary of arrays), optimizer (step,
    skipped, the optimizer's state) and data (the place in the data stream), and the whole
    configuration as JSON in its metadata. Saving happens in the background and is committed by
    a rename, so a kill at any time leaves only whole checkpoints. Use as a context manager:
    leaving the block waits for the last save.

    Args:
      workdir: the run's directory; made absolute, because Orbax writes relative paths in a
        background thread, where they fail without a word.
      keep: number of newest checkpoints kept.
    """

    def __init__(self, workdir: pathlib.Path | str, keep: int):
        self._directory = checkpoint_directory(workdir)
        latest: Any = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(
            str(self._directory),
            preservation_policy=latest,
            cleanup_tmp_directories=True,
        )
        self._pending = None

    @property
    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, data: Any, config: ExperimentConfig) -> None:
        """Start saving; does nothing if this step is already there.

        Args:
          step: the step that the state belongs to.
          state: may be donated right after the call.
          data: the Grain iterator, which may go on right after the call.
          config: stored as JSON with the checkpoint.

        Raises:
          Whatever went wrong in the save before this one.
        """
        self.wait()
        if step == self.latest_step:
            return
        items = {"params": plain(state.params), "optimizer": _optimizer_item(state)}
        self._pending = self._checkpointer.save_checkpointables_async(
            step,
            {**items, "data": data},
            force=True,
            custom_metadata={"format": FORMAT, "config": config.to_dict()},
        )

    def restore(self, abstract: TrainState, data: Any, config: ExperimentConfig) -> TrainState:
        """The newest checkpoint's state; the data iterator is moved to its place.

        Args:
          abstract: shapes and dtypes of the state, from `abstract_state`.
          data: a fresh iterator of `config.data`.
          config: the run's configuration, which the checkpoint must agree with.

        Raises:
          CheckpointError: another model or other data; the message names the first parameter
            or setting that differs.
        """
        step = self.latest_step
        if step is None:
            raise CheckpointError(f"there is no checkpoint in {self._directory}")
        path = self._directory / str(step)
        saved = _saved_config(path)
        expected = {"params": plain(abstract.params), "optimizer": _optimizer_item(abstract)}
        _check_tree(path, saved, expected, config)
        _check_config(path, saved, config)
        loaded = self._checkpointer.load_checkpointables(
            step, {**with_sharding(expected), "data": data}
        )
        rest = loaded["optimizer"]
        return TrainState(
            step=rest["step"],
            skipped=rest["skipped"],
            params=unplain(abstract.params, loaded["params"]),
            opt_state=unplain(abstract.opt_state, rest["opt_state"]),
        )

    def wait(self) -> None:
        """Wait for the running save, and raise what went wrong in it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info) -> None:
        try:
            self.wait()
        finally:
            self._checkpointer.close()


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
      CheckpointError: no checkpoint there, or none of that step.
    """
    directory = checkpoint_directory(workdir)
    if not directory.is_dir():
        raise CheckpointError(f"there is no checkpoint in {workdir}; train there first")
    checkpointer = ocp.training.Checkpointer(str(directory))
    try:
        steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
        if not steps:
            raise CheckpointError(f"there is no checkpoint in {workdir}; train there first")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise CheckpointError(
                f"step={step} is not in {workdir}, which has {', '.join(map(str, steps))}"
            )
        path = directory / str(step)
        saved = _saved_config(path)
        config = ExperimentConfig.from_dict(saved)
        graphdef, params = abstract_model(config.model)
        expected = {"params": plain(params)}
        _check_tree(path, saved, expected, config)
        loaded = checkpointer.load_checkpointables(step, with_sharding(expected))
    finally:
        checkpointer.close()
    return nnx.merge(graphdef, unplain(params, loaded["params"])), config, step


def _saved_config(path: pathlib.Path) -> dict[str, Any]:
    metadata: Any = ocp.metadata(str(path), checkpointable_name="params").custom_metadata
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} was not written by this version of fusedkv_jax.training"
        )
    return metadata["config"]


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
        "opt_state": plain(state.opt_state),
    }
