"""What the study asks, and the runs that answer it, the most telling first."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.study.recall.cells import Cell

SEEDS = (0, 1, 2)
# An eighth of the recipe's tokens, at a quarter of its length: what the questions that need
# many runs are asked at.
SMALL = {"seq_len": 128, "batch_size": 4, "steps": 2000}
Cells = tuple[Cell, ...]


@dataclasses.dataclass(frozen=True)
class Question:
    """A part of the report.

    Attributes:
      name: for --questions.
      title, text: its heading, and what was varied.
      cells: its runs; others may ask for the same ones.
      label: what a curve is called.
    """

    name: str
    title: str
    text: str
    cells: tuple[Cell, ...]
    label: Callable[[Cell], str]


def cells(names: list[str] | None = None, layouts: Sequence[str] = ()) -> Iterator[Cell]:
    """The runs of the questions of these names, or of all, each once; of these layouts, or all."""
    chosen = [question for question in QUESTIONS if names is None or question.name in names]
    for cell in dict.fromkeys(cell for question in chosen for cell in question.cells):
        if not layouts or cell.layout in layouts:
            yield cell


def _by_rate(cell: Cell) -> str:
    return f"{cell.layout}, {cell.learning_rate:g}"


def _by_layout(cell: Cell) -> str:
    return cell.layout


def _by_change(cell: Cell) -> str:
    changes = {name: value for name, value in cell.changes().items() if name not in SMALL}
    return ", ".join([cell.layout, *(f"{name} {value:g}" for name, value in changes.items())])


def _by_framework(cell: Cell) -> str:
    return f"{cell.layout}, {cell.framework}"


def _small(layout: str, seeds: Sequence[int] = SEEDS, **changes: Any) -> Cells:
    settings: dict[str, Any] = SMALL | changes
    return tuple(Cell(layout=layout, seed=seed, **settings) for seed in seeds)


# The upper half has its own values and the keys of layer 1, or its own keys and layer 0's values.
SHARED_KEYS, SHARED_VALUES = "0_1_k1v2_k1v3", "0_1_k2v0_k3v0"
FIRST = SEEDS[:1]

QUESTIONS: tuple[Question, ...] = (
    Question(
        "layouts",
        "Which part of the layout matters",
        "`mha` has keys and values of its own in all four layers. `fusedkv` fuses both of layers 0 "
        f"and 1 in the upper two. `{SHARED_VALUES}` changes `mha` by one thing: the upper two "
        f"layers read the values of layer 0. `{SHARED_KEYS}`: they read the keys of layer 1.",
        tuple(
            cell
            for seed in SEEDS
            for layout in ("fusedkv", "mha", SHARED_VALUES, SHARED_KEYS)
            for cell in _small(layout, (seed,))
        ),
        _by_layout,
    ),
    Question(
        "residual",
        "The share of the token in the residual stream",
        "The embedding begins eight times as large where it enters the first layer, as large as "
        "what each layer adds; the output head stays as it is.",
        tuple(
            cell
            for seed in SEEDS
            for layout in ("mha", "fusedkv")
            for scale in (8.0, 1.0)
            for cell in _small(layout, (seed,), embedding_scale=scale)
        ),
        _by_change,
    ),
    Question(
        "rate",
        "Learning rate of `mha`",
        "The recipe's rate is 0.01.",
        tuple(
            cell for rate in (1e-2, 5e-3, 3e-3) for cell in _small("mha", FIRST, learning_rate=rate)
        ),
        _by_rate,
    ),
    Question(
        "exit",
        "The early-exit loss",
        "`exit_scale` 0 trains the last layer's output alone.",
        tuple(cell for scale in (1.0, 0.0) for cell in _small("mha", FIRST, exit_scale=scale)),
        _by_change,
    ),
    Question(
        "others",
        "Other layouts",
        "With the recipe's settings at the small setting.",
        tuple(
            cell
            for layout in ("fusedkv_lite", "svformer", "yoco", "lite_reversed", "cla")
            for cell in _small(layout, FIRST)
        ),
        _by_layout,
    ),
    Question(
        "frameworks",
        "The contrast, by framework",
        "The same settings in both; each draws its own initial parameters.",
        tuple(
            cell
            for layout in ("fusedkv", "mha")
            for framework in ("torch", "jax")
            for cell in _small(layout, FIRST, framework=framework)
        ),
        _by_framework,
    ),
    Question(
        "recipe",
        "The recipe itself",
        "512 tokens x 4, 4,000 steps.",
        tuple(Cell(layout=layout, seed=0) for layout in ("fusedkv", "mha", SHARED_VALUES)),
        _by_layout,
    ),
)
