"""Successive halving: every candidate for a short time, the best of them longer and again."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

from experiments.study.recall import worker
from experiments.study.recall.cells import Cell
from experiments.study.retrieval.candidates import CANDIDATES, REFERENCES, ROWS


@dataclasses.dataclass(frozen=True)
class Rung:
    """A stage of the search.

    Attributes:
      steps: of each run, which has a schedule of its own.
      seeds: of the runs.
      entrants: how many candidates are in it, the best of the rung before; None for all.
    """

    steps: int
    seeds: tuple[int, ...]
    entrants: int | None


RUNGS = (Rung(1000, (0,), None), Rung(2000, (0,), 3), Rung(2000, (1, 2, 3), 2))
ALWAYS = ("mha", "fusedkv", "gqa", "svformer")  # in every rung: what the others are compared with
Accuracies = Mapping[Cell, float]


def cell(name: str, steps: int, seed: int) -> Cell:
    """The recall run of a layout: the small setting of --study=recall, for so many steps."""
    row = ROWS[name]
    return Cell(
        layout=row.layout,
        seed=seed,
        seq_len=128,
        batch_size=4,
        steps=steps,
        queries_per_kv_head=row.queries_per_kv_head,
    )


def entrants(rung: int, done: Accuracies) -> list[str] | None:
    """The layouts in a rung, in its order; None before all runs of the rung before are done.

    The best are those of the highest accuracy in the rung before, the mean over its seeds.
    """
    if rung == 0:
        return [*ALWAYS, *(name for name in (*REFERENCES, *CANDIDATES) if name not in ALWAYS)]
    before, last = entrants(rung - 1, done), RUNGS[rung - 1]
    runs = {name: [cell(name, last.steps, seed) for seed in last.seeds] for name in before or ()}
    if not runs or any(run not in done for own in runs.values() for run in own):
        return None
    ranked = sorted(
        (name for name in runs if name in CANDIDATES and name not in ALWAYS),
        key=lambda name: -sum(done[run] for run in runs[name]),
    )
    return [*ranked[: RUNGS[rung].entrants], *ALWAYS]


def cells(done: Accuracies) -> Iterator[Cell]:
    """The runs that the finished ones make possible, the most urgent first, done or not."""
    for rung in range(len(RUNGS)):
        names = entrants(rung, done)
        if names is None:
            return
        for seed in RUNGS[rung].seeds:
            yield from (cell(name, RUNGS[rung].steps, seed) for name in names)


def read(*folders: pathlib.Path) -> dict[Cell, float]:
    """Accuracy of the runs that have a record in one of the folders.

    Raises:
      ValueError: a file is no record.
    """
    found = [record for folder in folders for record in worker.read_all(folder)]
    return {Cell.from_dict(record["cell"]): worker.mean(record["final"]) for record in found}
