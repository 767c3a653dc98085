"""The other axis: the loss on text of the same layouts, in the smallest model of `scaling`."""

import dataclasses
import pathlib
from collections.abc import Iterator

from experiments.study import records, scaling
from experiments.study.grid import Cell, Seeds, Study
from experiments.study.retrieval import search
from experiments.study.retrieval.candidates import ROWS

SIZE = "0.05m"  # four layers, as those of the recall model
SEEDS = (0, 1, 2)  # no layout is chosen by a loss, so all of them are fresh
RATE = 0.064  # what the search of --study=scaling found for mha at this size


def study() -> Study:
    """The recipe of `scaling` at one size, with the rows of this study."""
    base = scaling.get_study()
    return dataclasses.replace(
        base, name="retrieval", sizes={SIZE: base.sizes[SIZE]}, rows=ROWS, checked=()
    )


def cell(name: str, seed: int) -> Cell:
    """The run of a layout; its seed decides the order of the text, too."""
    return Cell(SIZE, name, Seeds(seed, seed), RATE)


def cells(accuracies: search.Accuracies) -> Iterator[Cell]:
    """The runs that are worth their time, done or not: those of the last rung that is known first.

    Layouts of the last rung of all have every seed, the others the first.
    """
    last = len(search.RUNGS) - 1
    for rung in reversed(range(last + 1)):
        for seed in SEEDS if rung == last else SEEDS[:1]:
            for name in search.entrants(rung, accuracies) or ():
                yield cell(name, seed)


def read(own: pathlib.Path, other: pathlib.Path) -> dict[Cell, float]:
    """Nats per token by run: this study's records, and those of `scaling` for rows that are equal.

    Raises:
      ValueError: a file is no record.
    """
    base = scaling.get_study()
    shared = {
        found: loss
        for found, loss in records.losses(records.read_all(other, base)).items()
        if found.size == SIZE
        and found.row in ROWS
        and base.rows[found.row].apply(base.sizes[SIZE].model)
        == ROWS[found.row].apply(base.sizes[SIZE].model)
    }
    return shared | records.losses(records.read_all(own, study()))
