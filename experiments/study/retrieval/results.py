"""What the records say of each layout: accuracy, loss, cache, and which ones no other beats."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import experiments
from experiments.study import grid
from experiments.study.recall.cells import Cell
from experiments.study.retrieval import losses, search
from experiments.study.retrieval.candidates import BUDGET, ROWS, cache_share
from experiments.study.statistics import Estimate

_COMMITTED = pathlib.Path(experiments.__file__).parent / "results" / "study"
BySeed = Mapping[int, float]


@dataclasses.dataclass(frozen=True)
class Result:
    """A layout with what is known of it.

    Attributes:
      name: of its row.
      cache: share of `mha`'s cache.
      screened: accuracy of the short run.
      accuracy, loss: of the long runs, and on text in nats per token, by seed.
    """

    name: str
    cache: float
    screened: float | None
    accuracy: BySeed
    loss: BySeed

    @property
    def fits(self) -> bool:
        """It is within the budget."""
        return self.cache <= BUDGET

    @property
    def place(self) -> tuple[float, float] | None:
        """Loss of the first seed, and accuracy of the short run: one run each for all layouts."""
        loss = self.loss.get(losses.SEEDS[0])
        return None if loss is None or self.screened is None else (loss, self.screened)


def accuracies(folder: pathlib.Path) -> dict[Cell, float]:
    """Accuracy by run: of this study's records, and of the committed ones of `recall`."""
    return search.read(_COMMITTED / "recall" / "records", folder / "recall")


def losses_of(folder: pathlib.Path) -> dict[grid.Cell, float]:
    """Loss by run: of this study's records, and of the committed ones of `scaling`."""
    return losses.read(folder / "loss", _COMMITTED / "scaling" / "records")


def read(folder: pathlib.Path) -> list[Result]:
    """What a folder of records says of the layouts, in their order.

    Raises:
      ValueError: it has no records of this study, or others.
    """
    if not any((folder / part).is_dir() for part in ("recall", "loss")):
        raise ValueError(f"{folder} holds no records of --study=retrieval; run the study first")
    answered, told = accuracies(folder), losses_of(folder)
    short, long = search.RUNGS[0], search.RUNGS[1:]
    seeds = [seed for rung in long for seed in rung.seeds]
    return [
        Result(
            name,
            cache_share(row),
            answered.get(search.cell(name, short.steps, short.seeds[0])),
            {
                seed: answered[cell]
                for seed in seeds
                if (cell := search.cell(name, long[0].steps, seed)) in answered
            },
            {
                seed: told[cell]
                for seed in losses.SEEDS
                if math.isfinite(told.get(cell := losses.cell(name, seed), math.inf))
            },
        )
        for name, row in ROWS.items()
    ]


def front(found: Sequence[Result]) -> list[str]:
    """Layouts within the budget that no other beats in accuracy without a higher loss.

    Both are those of the first rung: longer runs are not there for all, and not with equal seeds.
    """
    placed = [(result.name, *result.place) for result in found if result.fits and result.place]
    return [
        name
        for name, loss, accuracy in placed
        if not any(
            other != name and better >= accuracy and lower <= loss
            for other, lower, better in placed
        )
    ]


def paired(ours: BySeed, theirs: BySeed) -> Estimate | None:
    """Ours minus theirs on the seeds that both have; None if there are none."""
    common = sorted(ours.keys() & theirs.keys())
    return Estimate.of([ours[seed] - theirs[seed] for seed in common]) if common else None
