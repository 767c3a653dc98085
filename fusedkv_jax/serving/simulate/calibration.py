"""How long a step of a real engine takes: a linear model of its work, fitted to logged steps."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fusedkv_jax.serving.plan import StepPlan
from fusedkv_jax.serving.shapes import StepShapes

if TYPE_CHECKING:
    from fusedkv_jax.costs import StepCosts

# What takes time, each with a coefficient of 0 or more. Rows are those of the arrays, padding
# included; a lane's attention may pass over every row as far as its longest one reaches, in tiles.
# Products of a chunk fill the units that a decoded token leaves idle: a FLOP takes less there.
TERMS = (
    "step",  # whatever its work
    "chunk_step",  # of those with chunks, which have a second lane
    "first_decodes",  # rows whose prompt was computed by the step before; they take longer
    "decode_flops",  # of tokens in the lane of decodes, in the layers that cache something
    "chunk_flops",  # likewise, in that of chunks
    "upper_flops",  # of sampled rows in the layers above, and the output head
    "attention_flops",  # of the pairs of queries and keys that see each other
    "decode_sweep_flops",  # of pairs as far as the longest row reaches, in the lane of decodes
    "chunk_sweep_flops",  # likewise, in that of chunks
    "weight_bytes",  # that are read
    "cache_bytes",  # that are read and written
    "copied_bytes",  # of pages
)
_TILE = 128  # tokens that kernels read at once: a shorter row takes as long
_ROUNDS = 30  # of reweighting, after which the fit has settled
_SMALLEST = 1e-3  # relative error below which all count alike
_ODD = 3.0  # times what is predicted: some other program ran in between


class LoggedStep(NamedTuple):
    """The terms of a step's work, in the order of `TERMS`, and the seconds that it took."""

    work: tuple[float, ...]
    seconds: float


def step_work(
    costs: StepCosts, plan: StepPlan, shapes: StepShapes, page_size: int
) -> tuple[float, ...]:
    """The terms of a planned step.

    Args:
        costs: of the model.
        plan: the step, before it is taken in.
        shapes: sizes that the engine rounds up to.
        page_size: tokens of a page.

    Raises:
        ValueError: a step that these shapes do not hold.
    """
    starts, lengths = (
        np.array([getattr(r, name) for r in plan.requests], np.int64)
        for name in ("computed", "length")
    )
    counts = np.asarray(plan.counts, np.int64)
    ends = starts + counts
    sampled = ends == lengths
    single = counts == 1
    first = single & (starts == np.array([len(r.prompt) for r in plan.requests]))
    chunk_rows = int((-(-counts[~single] // shapes.chunk)).sum())
    try:
        rows, chunk_rows = shapes.fit(max(int(single.sum()), int(sampled.sum())), chunk_rows)
    except StopIteration:
        raise ValueError(
            f"a step of {len(counts)} requests and {plan.tokens} tokens is larger than any that"
            " was calibrated; lower max_num_seqs and max_num_batched_tokens to its values"
        ) from None
    work = costs.work(starts, counts, sampled)
    lower, upper = (
        sum(getattr(of, f"{part}_flops") for of in costs.attention.values())
        for part in ("lower", "upper")
    )
    plain = plan.tokens * costs.token_flops + int(sampled.sum()) * costs.row_flops
    reach, chunk_reach = (
        -(-int(ends[lane].max(initial=0)) // _TILE) * _TILE for lane in (single | sampled, ~single)
    )
    return (
        1.0,
        float(chunk_rows > 0),
        float(first.sum()),
        rows * costs.token_flops,
        chunk_rows * shapes.chunk * costs.token_flops,
        rows * costs.row_flops,
        work.flops - plain,
        float(rows * reach * (lower + upper)),
        float(chunk_rows * shapes.chunk * chunk_reach * lower),
        work.weight_bytes,
        work.cache_bytes,
        float(len(plan.copies) * page_size * costs.cache_bytes_per_token),
    )


@dataclasses.dataclass(frozen=True)
class CalibratedDevice:
    """A device whose steps take what was fitted to a log of them; it stands for a `Device`.

    Attributes:
        name: of the device.
        coefficients: seconds of a unit of each of `TERMS`.
        shapes: of the engine's steps.
        cache_dtype: storage type of its cache.
        memory: bytes of caches.
        median_error: relative, of steps that were not fitted to; NaN where nobody has looked.
        repeat_error: relative, of guessing these steps from their own repeats.
    """

    name: str
    coefficients: dict[str, float]
    shapes: StepShapes
    cache_dtype: str
    memory: float
    median_error: float = math.nan
    repeat_error: float = math.nan

    def num_pages(self, costs: StepCosts, page_size: int) -> int:
        """Pages that the caches' memory holds."""
        return max(1, int(self.memory // (page_size * costs.cache_bytes_per_token)))

    def seconds_per_page(self, costs: StepCosts, page_size: int) -> float:
        """What copying a page takes."""
        return self.coefficients["copied_bytes"] * page_size * costs.cache_bytes_per_token

    def step_seconds(self, costs: StepCosts, plan: StepPlan, page_size: int) -> float:
        """What a step takes. Raises ValueError for one larger than any that was logged."""
        work = step_work(costs, plan, self.shapes, page_size)
        return float(np.dot(work, [self.coefficients[term] for term in TERMS]))

    def write(self, path: pathlib.Path) -> None:
        """Put it down as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | pathlib.Path) -> CalibratedDevice:
        """What `write` put down.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no calibration.
        """
        try:
            document: dict[str, Any] = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            shapes: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in document.pop("shapes").items()
            }
            coefficients = {term: float(document["coefficients"][term]) for term in TERMS}
            return cls(**{**document, "coefficients": coefficients, "shapes": StepShapes(**shapes)})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no calibration of experiments.calibrate: {error}"
            ) from None


def fit(steps: Sequence[LoggedStep]) -> dict[str, float]:
    """Coefficients of a log: non-negative, robust to odd steps, and right in the sum.

    They minimize the mean absolute relative error, which finds what a typical step takes. Times
    are skewed, and a queue feels their mean: all are then scaled so that the predicted seconds add
    up to those of the log.

    Args:
        steps: a log; steps whose time some other program has taken do not count.
    """
    from scipy.optimize import nnls

    work, seconds = np.array([s.work for s in steps]), np.array([s.seconds for s in steps])
    relative = work / seconds[:, None]
    scale = np.maximum(relative.max(axis=0), 1e-300)
    found, weights = np.zeros(len(TERMS)), np.ones(len(steps))
    for _ in range(_ROUNDS):  # least squares of ever better weights: least absolute errors
        found, _ = nnls(relative / scale * weights[:, None], weights)
        error = np.abs(relative / scale @ found - 1)
        weights = 1 / np.sqrt(np.maximum(error, _SMALLEST))
    found = found / scale
    predicted = work @ found
    usual = seconds < _ODD * predicted
    found *= seconds[usual].sum() / predicted[usual].sum()
    return dict(zip(TERMS, found.tolist(), strict=True))


def errors(coefficients: dict[str, float], steps: Sequence[LoggedStep]) -> np.ndarray:
    """Relative errors of the predicted seconds of steps."""
    work, seconds = np.array([s.work for s in steps]), np.array([s.seconds for s in steps])
    return np.abs(work @ np.array([coefficients[term] for term in TERMS]) / seconds - 1)


def typical(rounds: Sequence[Sequence[LoggedStep]]) -> list[LoggedStep]:
    """Each step of several logs of the same steps, once, with the median of its seconds.

    Raises:
        ValueError: the logs are not of the same steps.
    """
    work, seconds = _together(rounds)
    return list(map(LoggedStep, work, np.median(seconds, axis=0).tolist()))


def repeat_errors(rounds: Sequence[Sequence[LoggedStep]]) -> np.ndarray:
    """Relative errors of guessing a step's seconds as the median of its repeats in other logs.

    They come of the machine alone: whatever is told of a step's work, it has the same in each log.

    Raises:
        ValueError: the logs are not of the same steps, or fewer than two.
    """
    _, seconds = _together(rounds)
    if len(seconds) < 2:
        raise ValueError(f"{len(seconds)} logs; a step is compared with its repeats in others")
    others = [np.median(np.delete(seconds, i, axis=0), axis=0) for i in range(len(seconds))]
    return np.abs(np.array(others) / seconds - 1).ravel()


class Accuracy(NamedTuple):
    """Median relative errors of the seconds of steps.

    Attributes:
        median_error: of what is predicted from their work.
        repeat_error: of guessing each from its own repeats: what no fit to work is much below.
        typical_error: of what is predicted, as the seconds of the median of each step's repeats.
    """

    median_error: float
    repeat_error: float
    typical_error: float

    @classmethod
    def of(
        cls, coefficients: dict[str, float], engines: Sequence[Sequence[Sequence[LoggedStep]]]
    ) -> Accuracy:
        """Of the steps of each engine, in several logs of the same ones."""
        steps = [step for rounds in engines for log in rounds for step in log]
        middle = [step for rounds in engines for step in typical(rounds)]
        repeats = np.concatenate([repeat_errors(rounds) for rounds in engines])
        found = errors(coefficients, steps), repeats, errors(coefficients, middle)
        return cls(*(float(np.median(each)) for each in found))


def _together(
    rounds: Sequence[Sequence[LoggedStep]],
) -> tuple[list[tuple[float, ...]], np.ndarray]:
    """The work of each step, and its seconds in each log: [logs, steps]."""
    work, *others = ([step.work for step in log] for log in rounds)
    if any(other != work for other in others):
        raise ValueError("the logs are of different steps; log the same ones in each")
    return work, np.array([[step.seconds for step in log] for log in rounds])
