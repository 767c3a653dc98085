"""Where metrics go (lines, JSON lines, TensorBoard, W&B) and what is computed from raw counts."""

import importlib
import json
import math
import os
import pathlib
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from tensorboard import summary


@runtime_checkable
class MetricWriter(Protocol):
    """Anything that takes the metrics of a step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics, whose names look like "train/loss", of a step."""
        ...

    def close(self) -> None:
        """Flush and release what is open."""
        ...


class LineWriter:
    """One readable line per call, given to `print_line`.

    Args:
      print_line: takes the line, for instance `Progress.print`.
      total: the last step, shown after the step.
      time_left: gives the time to the end, shown last.
    """

    def __init__(
        self, print_line: Callable[[str], None], total: int, time_left: Callable[[], str]
    ) -> None:
        self._print = print_line
        self._total = total
        self._time_left = time_left

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        fields = "  ".join(
            f"{name.removeprefix('train/').replace('/', ' ')} {_short(value)}"
            for name, value in metrics.items()
        )
        self._print(f"step {step}/{self._total}  {fields}  left {self._time_left()}")

    def close(self) -> None:
        pass


class JsonLinesWriter:
    """One JSON object per call: step, time (seconds since 1970) and the metrics.

    Numbers that are not finite are written as null, which JSON can hold.

    Args:
      path: the file; it is appended to.
      last_step: lines of later steps, and what this class did not write, are moved to a file of
        the same name with `.replaced` before the suffix first. A run that resumes from a
        checkpoint computes those steps again, and each step should be in the file once.
      report: takes the line that says so where something else than later steps was moved.

    Raises:
      ValueError: there is something of that name that is no file.
    """

    def __init__(
        self, path: pathlib.Path, last_step: int = 0, report: Callable[[str], object] = print
    ) -> None:
        path = path.resolve()  # a link stays one
        if path.exists():
            _set_lines_aside(path, last_step, report)
        self._file = open(path, "a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        record = {"step": step, "time": round(time.time(), 3), **finite_or_none(metrics)}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """Scalars in a TensorBoard log directory."""

    def __init__(self, directory: pathlib.Path) -> None:
        self._writer = summary.Writer(str(directory))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Scalars in a run of Weights & Biases, which a resumed training run goes on with.

    Steps that are computed again after a kill are there already, with the same values.

    Args:
      project: of Weights & Biases.
      name: of the run.
      config: shown with the run.
      workdir: keeps the run's files and its identity.

    Raises:
      ValueError: the package wandb is not installed.
    """

    def __init__(
        self, project: str, name: str, config: dict[str, object], workdir: pathlib.Path
    ) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError:
            raise ValueError(
                f"wandb_project={project} needs the package wandb; pip install wandb, or leave the "
                "option out"
            ) from None
        identity = workdir / "wandb_id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            name=name,
            config=config,
            dir=str(workdir),
            id=identity.read_text(),
            resume="allow",
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MultiWriter:
    """Passes every call on to several writers.

    A writer that fails, because the disk is full, say, is reported once and left out from then on:
    no run ends for its metrics.

    Args:
      writers: the writers.
      report: takes the line about a failure.
    """

    def __init__(
        self, writers: Sequence[MetricWriter], report: Callable[[str], None] = print
    ) -> None:
        self._writers = list(writers)
        self._report = report

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda writer: writer.write(step, metrics))

    def close(self) -> None:
        self._each(lambda writer: writer.close())

    def _each(self, call: Callable[[MetricWriter], None]) -> None:
        for writer in list(self._writers):
            try:
                call(writer)
            except Exception as error:  # of any kind: a run outlives its metrics
                self._writers.remove(writer)
                reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
                self._report(f"warning: {type(writer).__name__} stops, training goes on: {reason}")


class StepTimer:
    """Rates of the steps since the last report; evaluation and saving do not count.

    Args:
      tokens_per_step: tokens of one batch, padding included.
      flops_per_token: model FLOPs of forward and backward, or None.
      peak_flops: of all devices together, or None where unknown.
    """

    def __init__(
        self, tokens_per_step: int, flops_per_token: float | None, peak_flops: float | None
    ) -> None:
        self._tokens = tokens_per_step
        self._flops = flops_per_token
        self._peak = peak_flops
        self.restart()

    def restart(self) -> None:
        """Forget what was counted and start a new stretch now."""
        self._start = time.perf_counter()
        self._waited = 0.0
        self._steps = 0

    def count(self, seconds_waited: float) -> None:
        """Count one step, which waited that long for its batch."""
        self._steps += 1
        self._waited += seconds_waited

    def report(self) -> dict[str, float]:
        """tokens_per_second, data_wait (share of the time spent waiting for data) and, where
        both figures are known, mfu (model FLOPs utilisation, arXiv 2204.02311 appendix B)."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rate = self._steps * self._tokens / seconds
        figures = {"tokens_per_second": rate, "data_wait": self._waited / seconds}
        if self._flops is not None and self._peak is not None:
            figures["mfu"] = rate * self._flops / self._peak
        return figures


def bits_per_byte(loss_sum: float, num_bytes: int) -> float:
    """Cross-entropy in bits per UTF-8 byte of text, comparable between tokenizers.

    Args:
      loss_sum: negative log-likelihood of the text in nats, summed over its tokens.
      num_bytes: bytes of that text, 1 or more.
    """
    return loss_sum / (math.log(2) * num_bytes)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def finite_or_none(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The metrics with None for what is not finite, which JSON cannot hold."""
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in metrics.items()
    }


def last_step(path: pathlib.Path) -> int:
    """The last step in a file of `JsonLinesWriter`; 0 if there is none."""
    if not path.is_file():
        return 0
    steps = (step_of(line) for line in path.read_bytes().splitlines())
    return max((step for step in steps if step is not None), default=0)


def step_of(line: bytes) -> int | None:
    """The step of a line of `JsonLinesWriter`; None for any other, or one that was cut off."""
    try:
        record = json.loads(line)
        if not isinstance(record["time"], float):
            return None
        return record["step"] if type(record["step"]) is int else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _set_lines_aside(path: pathlib.Path, last_step: int, report: Callable[[str], object]) -> None:
    """Leave the lines of steps up to `last_step`; the others go to the end of another file."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; move it away")
    kept, others, foreign = [], [], 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        step = step_of(line)
        keep = step is not None and step <= last_step and line.endswith(b"\n")
        (kept if keep else others).append(line)
        # A last line without its end was cut off when the process was killed.
        foreign += step is None and (line.endswith(b"\n") or number < len(lines))
    if not others:
        return
    aside = path.with_name(f"{path.stem}.replaced{path.suffix}")
    with open(aside, "ab") as file:
        file.writelines(line.rstrip(b"\r\n") + b"\n" for line in others)
        file.flush()
        os.fsync(file.fileno())
    if foreign:
        report(f"warning: {path} had {foreign} lines that are not metrics; moved to {aside}")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = pathlib.Path(folder, path.name)
        temporary.write_bytes(b"".join(kept))
        os.replace(temporary, path)
