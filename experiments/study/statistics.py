"""What the records say: means over draws, and differences of runs that had equal draws."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from scipy import stats

from experiments.study import plan, records
from experiments.study.grid import Cell, Seeds, Study

CONFIDENCE = 0.95
Losses = Mapping[Seeds, float]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over draws.

    Attributes:
      mean: of the values.
      count: how many there are.
      half_width: of the two-sided confidence interval around the mean, by Student's t with
        count - 1 degrees of freedom; None for one value, which has no spread.
    """

    mean: float
    count: int
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float], confidence: float = CONFIDENCE) -> "Estimate":
        """The estimate from one value or more."""
        mean, count = statistics.fmean(values), len(values)
        if count == 1:
            return cls(mean, count, None)
        quantile = float(stats.t.ppf((1 + confidence) / 2, count - 1))
        return cls(mean, count, quantile * statistics.stdev(values) / math.sqrt(count))

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval is on one side of zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def paired(ours: Losses, theirs: Losses) -> Estimate | None:
    """Ours minus theirs on the draws that both have; None if there are none.

    Runs of one draw start from one seed and see the same batches, so that a part of what draws
    differ by cancels. Not all: roundings and the layouts themselves lead runs apart.
    """
    common = sorted(ours.keys() & theirs.keys())
    return Estimate.of([ours[draw] - theirs[draw] for draw in common]) if common else None


@dataclasses.dataclass(frozen=True)
class Line:
    """A row at a size, over the draws that are finished.

    Attributes:
      size, row: which.
      record: one of its records, for what all have in common.
      loss, bits_per_byte: on held-out text.
      others: bits per byte on the other texts, by name.
      against: loss minus that of another row on equal draws, by that row's name.
      diverged: draws that ended without a finite loss and are in no mean.
    """

    size: str
    row: str
    record: records.Record
    loss: Estimate
    bits_per_byte: Estimate
    others: dict[str, Estimate]
    against: dict[str, Estimate]
    diverged: int


def lines(study: Study, found: Sequence[records.Record]) -> list[Line]:
    """One line for each row that has a finished run at its size's tuned learning rate."""
    losses = records.losses(found)
    by_cell = {records.cell_of(record): record for record in found}
    result = []
    for size in study.sizes:
        rate = plan.tuned_rate(study, losses, size, study.reference)
        if rate is None:
            continue
        rows = {row: draws(study, by_cell, size, row, rate) for row in study.rows}
        for row, own in rows.items():
            finite = {d: r for d, r in own.items() if math.isfinite(records.loss_of(r))}
            if finite:
                others = {name: rows[name] for name in (study.reference, study.equal_cache)}
                result.append(_line(size, row, finite, others, len(own) - len(finite)))
    return result


def without_loss(study: Study, found: Sequence[records.Record], size: str) -> dict[str, int]:
    """Rows of a size that have no line because all their runs diverged, and how many those are."""
    rate = plan.tuned_rate(study, records.losses(found), size, study.reference)
    if rate is None:
        return {}
    by_cell = {records.cell_of(record): record for record in found}
    rows = {row: draws(study, by_cell, size, row, rate) for row in study.rows}
    return {row: len(own) for row, own in rows.items() if own and not finite_losses(own)}


def draws(
    study: Study, by_cell: Mapping[Cell, records.Record], size: str, row: str, rate: float
) -> dict[Seeds, records.Record]:
    """The records of a row at a size and rate, by draw."""
    cells = {draw: Cell(size, row, draw, rate) for draw in study.draws_of(size, row)}
    return {draw: by_cell[cell] for draw, cell in cells.items() if cell in by_cell}


def _line(
    size: str,
    row: str,
    own: Mapping[Seeds, records.Record],
    others: Mapping[str, Mapping[Seeds, records.Record]],
    diverged: int,
) -> Line:
    def estimate(text: str) -> Estimate:
        return Estimate.of([record["losses"][text]["bits_per_byte"] for record in own.values()])

    losses = finite_losses(own)
    first = next(iter(own.values()))
    against = {
        name: difference
        for name, theirs in others.items()
        if name != row and (difference := paired(losses, finite_losses(theirs))) is not None
    }
    return Line(
        size=size,
        row=row,
        record=first,
        loss=Estimate.of(list(losses.values())),
        bits_per_byte=estimate("heldout"),
        others={text: estimate(text) for text in first["losses"] if text != "heldout"},
        against=against,
        diverged=diverged,
    )


def finite_losses(found: Mapping[Seeds, records.Record]) -> dict[Seeds, float]:
    """Held-out losses of the runs that did not diverge, by draw."""
    losses = {draw: records.loss_of(record) for draw, record in found.items()}
    return {draw: loss for draw, loss in losses.items() if math.isfinite(loss)}
