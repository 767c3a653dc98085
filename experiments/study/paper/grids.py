"""What is trained: variants of the layout at the smallest size, and three layouts at more depth."""

import dataclasses
import pathlib
from collections.abc import Iterator

from experiments.study import records, scaling
from experiments.study.grid import Cell, Row, Seeds, Size, Study

SIZE = "0.05m"
DEEP = "8layers"  # twice the layers: with four there are two sources and two rows to a picture
RATE = 0.064  # what the search of --study=scaling found for mha at SIZE
REFERENCE = "fusedkv"
# Their runs are those of --study=scaling.
SHARED = ("mha", "fusedkv", "fusedkv_lite", "yoco")
_CHECKPOINTS = 100  # more than a run makes: gradients are taken at all of them

ABLATION = {
    "lite_learnable": Row(layout="lite_learnable"),
    "lite_reversed": Row(layout="lite_reversed"),
    "iterative": Row(layout="fusedkv:parameterization=iterative"),
    "normal": Row(layout="fusedkv:parameterization=normal"),
}
DEPTH = {name: Row(layout=name) for name in ("dense_fusion", "fusedkv", "mha")}


def ablation() -> Study:
    """The recipe of `scaling` at its smallest size, with variants of fusedkv."""
    base = scaling.get_study()
    return dataclasses.replace(
        base,
        name="paper",
        sizes={SIZE: base.sizes[SIZE]},
        rows=ABLATION,
        checked=(),
    )


def depth() -> Study:
    """Eight layers of the same width, with half the tokens for each parameter: about as many."""
    base = scaling.get_study()
    model = base.sizes[SIZE].model.replace(num_layers=8)
    return dataclasses.replace(
        base,
        name="paper",
        tokens_per_parameter=10,
        sizes={DEEP: Size(model=model, batch_size=8, learning_rate=RATE)},
        rows=DEPTH,
        checked=(),
        checkpoints=_CHECKPOINTS,
    )


def cells() -> Iterator[tuple[str, Cell]]:
    """("ablation" or "depth", run), the most urgent first: one draw of the latter shows most."""
    first, *others = scaling.get_study().draws

    def deep(draws: list[Seeds]) -> Iterator[tuple[str, Cell]]:
        yield from (("depth", Cell(DEEP, row, draw, RATE)) for draw in draws for row in DEPTH)

    yield from deep([first])
    for row in ABLATION:
        yield from (("ablation", Cell(SIZE, row, draw, RATE)) for draw in (first, *others))
    yield from deep(others)


def shared(folder: pathlib.Path) -> list[records.Record]:
    """The records of `scaling` that are compared with: its smallest size at the rate of these runs.

    Raises:
      ValueError: a file is no record.
    """
    found = records.read_all(folder, scaling.get_study())
    return [
        record
        for record in found
        if (cell := records.cell_of(record)).size == SIZE
        and cell.row in SHARED
        and cell.learning_rate == RATE
    ]
