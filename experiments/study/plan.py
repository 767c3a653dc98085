"""Which cells of a study are next: first those that tune, then row after row."""

from collections.abc import Iterator, Mapping, Sequence

from experiments.study.grid import Cell, Study

RATIO = 2.0  # between neighboring learning rates
Losses = Mapping[Cell, float]


def wanted(
    study: Study,
    losses: Losses,
    sizes: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
) -> Iterator[Cell]:
    """The cells that the records so far make possible, the most urgent first, done or not.

    Args:
      study: the grid.
      losses: held-out loss of each finished cell, infinite where it diverged.
      sizes, rows: only these; the reference is tuned in any case.
    """
    for size in sizes or study.sizes:
        rate = tuned_rate(study, losses, size, study.reference)
        yield from search(study, losses, size, study.reference)
        if rate is None:
            continue
        chosen = rows or list(study.rows)
        for row in chosen:
            for draw in study.draws:
                yield Cell(size, row, draw, rate)
        for row in study.checked:
            if row in chosen:
                yield from (
                    Cell(size, row, study.draws[0], near) for near in (rate / RATIO, rate * RATIO)
                )
        more = study.sizes[size].more_draws
        for draw in sorted({draw for draws in more.values() for draw in draws}):
            yield from (Cell(size, row, draw, rate) for row in chosen if draw in more.get(row, ()))


def search(study: Study, losses: Losses, size: str, row: str) -> Iterator[Cell]:
    """The cells that find a row's learning rate: the lowest loss between two higher ones."""

    def cell(rate: float) -> Cell:
        return Cell(size, row, study.draws[0], rate)

    rate = study.sizes[size].learning_rate
    yield from (cell(near) for near in (rate, rate / RATIO, rate * RATIO))
    for step in (1 / RATIO, RATIO):
        here = rate * step
        # On and on in one direction while that is better.
        while losses.get(cell(here), float("inf")) < losses.get(cell(here / step), float("-inf")):
            here *= step
            yield cell(here)


def tuned_rate(study: Study, losses: Losses, size: str, row: str) -> float | None:
    """The rate that the search has found; None before all its cells are finished."""
    cells = list(search(study, losses, size, row))
    if not all(cell in losses for cell in cells):
        return None
    return min(cells, key=lambda cell: losses[cell]).learning_rate
