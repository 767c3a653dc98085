"""Runs that a comparison is made of: trained once, resumed if cut off, never mixed up."""

import dataclasses
import json
import os
import pathlib
import time
from typing import Any

from experiments.common.documents import Document
from fusedkv_jax import training
from fusedkv_jax.training import ExperimentConfig
from fusedkv_jax.training.config import first_difference

RUN_FILE = "run.json"
# What may change between two calls of one run: neither the model nor its data depend on these.
_RUNTIME_FIELDS = {
    "model": ("attention", "remat", "scan_layers"),
    "data": ("max_document_mib", "num_threads", "prefetch_batches"),
    "train": (
        "log_every",
        "eval_every",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep_checkpoints",
        "peak_flops",
    ),
}


class Interrupted(Exception):
    """A signal ended a run early; its state is saved."""


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
      config: what it was trained with.
      workdir: its directory, for `fusedkv_jax.training.load_model`.
      seconds: time spent in `train`, compilation and evaluation included, over all its calls.
      loss: on held-out text after the last step, in nats per token.
      bits_per_byte: the same in bits per byte of text.
      was_finished: whether this call found it finished and did nothing.
    """

    config: ExperimentConfig
    workdir: pathlib.Path
    seconds: float
    loss: float
    bits_per_byte: float
    was_finished: bool

    @property
    def history(self) -> list[dict[str, float]]:
        """The lines of metrics that training wrote, in order."""
        return _history(self.workdir)


def complete(config: ExperimentConfig, workdir: pathlib.Path | str, **options: Any) -> FinishedRun:
    """Train to the end, go on with a run that was cut off, or return a finished one at once.

    `workdir/run.json` holds the whole configuration from the start and the result in the end.

    Args:
      config: the experiment; it must evaluate (train.eval_batches above 0).
      workdir: its directory, created if it does not exist.
      options: what `train` takes besides: the model that it begins with, a teacher.

    Raises:
      Interrupted: SIGTERM or SIGINT; the state is saved.
      ValueError: the directory holds a run of another configuration, and what `train` raises.
    """
    if config.train.eval_batches == 0:
        raise ValueError("train.eval_batches=0 leaves nothing to compare; use 1 or more")
    workdir = pathlib.Path(workdir).expanduser().resolve()
    record = _read(workdir)
    if record is not None:
        check_same(record["config"], config, workdir)
        if record["result"] is not None:
            return FinishedRun(config, workdir, **record["result"], was_finished=True)
    seconds = 0.0 if record is None else record["seconds"]
    if record is None:
        if workdir.exists() and not workdir.is_dir():
            raise ValueError(f"workdir {workdir} is a file; name a directory")
        workdir.mkdir(parents=True, exist_ok=True)
        _write(workdir, config, seconds, None)
    start = time.perf_counter()
    trained = training.train(config, workdir, **options)
    seconds += time.perf_counter() - start
    if trained.interrupted:
        _write(workdir, config, seconds, None)
        raise Interrupted(f"{trained.interrupted}: {workdir} is saved; run the same command again")
    last = _history(workdir)[-1]
    result = {
        "seconds": seconds,
        "loss": last["eval/loss"],
        "bits_per_byte": last["eval/bits_per_byte"],
    }
    _write(workdir, config, seconds, result)
    return FinishedRun(config, workdir, **result, was_finished=False)


def seconds(workdir: pathlib.Path) -> float:
    """Time spent so far on the run of a directory; 0 where there is none."""
    record = _read(workdir)
    return 0.0 if record is None else record["seconds"]


def _history(workdir: pathlib.Path) -> list[dict[str, float]]:
    from fusedkv_jax.training.loop import METRICS_FILE

    lines = (workdir / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _read(workdir: pathlib.Path) -> Document | None:
    path = workdir / RUN_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("config", "seconds", "result")}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; remove {workdir} or use another --workdir") from None


def _write(
    workdir: pathlib.Path,
    config: ExperimentConfig,
    seconds: float,
    result: Document | None,
) -> None:
    record = {"config": config.to_dict(), "seconds": seconds, "result": result}
    temporary = workdir / (RUN_FILE + ".partial")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, workdir / RUN_FILE)


def check_same(saved: Document, config: ExperimentConfig, workdir: pathlib.Path) -> None:
    """Raise ValueError unless a directory's configuration gives what this one would."""
    now = json.loads(json.dumps(config.to_dict()))
    try:  # settings that are newer than the run had their defaults then
        saved = json.loads(json.dumps(ExperimentConfig.from_dict(saved).to_dict()))
    except ValueError:
        pass  # a setting that is no more: the comparison names it
    difference = first_difference(_comparable(saved), _comparable(now))
    if difference:
        raise ValueError(
            f"{workdir} holds a run with another setting, {difference}; set it back, remove "
            "that directory, or use another --workdir"
        )


def _comparable(config: Document) -> Document:
    return {
        part: {k: v for k, v in values.items() if k not in _RUNTIME_FIELDS.get(part, ())}
        if isinstance(values, dict)
        else values
        for part, values in config.items()
    }
