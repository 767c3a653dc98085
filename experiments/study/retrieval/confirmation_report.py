"""The table and the picture of the runs with more layers, from their records alone."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments.common.documents import Document
from experiments.study.recall import worker
from experiments.study.recall.cells import Cell
from experiments.study.retrieval import confirmation
from experiments.study.retrieval.confirmation import (
    CHOICE,
    DEEPER,
    FORMS,
    LENGTH,
    ROWS,
    SEEDS,
    STEPS,
    WIDER,
    Size,
)
from experiments.study.retrieval.report import difference
from experiments.study.retrieval.results import BySeed
from experiments.study.statistics import CONFIDENCE, Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AGAINST = ("mha", "fusedkv")
_HEAD = (
    "name",
    "layout",
    "cache, of mha's",
    f"accuracy, seed {CHOICE}",
    "fresh seeds",
    "accuracy",
    "min to max",
    *(f"minus {name}" for name in AGAINST),
    f"width {WIDER.width}, seed {CHOICE}",
)
Runs = Mapping[str, Mapping[int, Document]]  # records by layout and seed


def read(folder: pathlib.Path, size: Size = DEEPER) -> Runs:
    """The finished runs of each layout at a size, in the order of `ROWS`.

    Raises:
      ValueError: a file is no record.
    """
    records = {Cell.from_dict(r["cell"]): r for r in worker.read_all(folder / "recall")}
    seeds = (CHOICE, *SEEDS)
    cells = {name: {s: confirmation.cell(name, s, size) for s in seeds} for name in ROWS}
    return {
        name: {seed: records[cell] for seed, cell in own.items() if cell in records}
        for name, own in cells.items()
    }


def write(runs: Runs, wider: Runs, target: pathlib.Path) -> str:
    """Write confirmation.md, and confirmation.png if there are runs; returns the table's text."""
    target.mkdir(parents=True, exist_ok=True)
    text = markdown(runs, wider)
    (target / "confirmation.md").write_text(text, encoding="utf-8")
    if any(_fresh(own) for own in runs.values()):
        draw(runs, target / "confirmation.png")
    return text


def markdown(runs: Runs, wider: Runs) -> str:
    """The runs of both sizes as a Markdown document."""
    ruler = ["---", "---", *["---:"] * (len(_HEAD) - 2)]
    rows = [[*_cells(name, runs), _first(wider.get(name, {}))] for name in _ranked(runs)]
    return "\n".join(
        [
            "# Study: retrieval, with more layers",
            "",
            f"{DEEPER.layers} layers of width {DEEPER.width} with {DEEPER.heads} heads, {STEPS:,} "
            f"steps on {LENGTH} tokens; the last column is of width {WIDER.width} with "
            f"{WIDER.heads} heads. The cache is counted at that length. Accuracy is the mean over "
            f"six recall tasks. Seed {CHOICE} chose between the forms of the search's best layout "
            f"({' and '.join(f'`{name}`' for name in FORMS)}); by the fresh seeds "
            f"{', '.join(map(str, SEEDS))} nothing was chosen; the columns to the differences are "
            "of these alone. Differences are of runs with equal seeds, "
            f"± half of the {CONFIDENCE:.0%} interval by Student's t; **bold** where it excludes "
            "zero, with no correction for the number of comparisons.",
            "",
            *("| " + " | ".join(cells) + " |" for cells in (_HEAD, ruler, *rows)),
            "",
        ]
    )


def _fresh(own: Mapping[int, Document]) -> BySeed:
    return {seed: worker.mean(own[seed]["final"]) for seed in SEEDS if seed in own}


def _ranked(runs: Runs) -> list[str]:
    """The best on fresh seeds first, then those that have none."""

    def rank(name: str) -> float:
        fresh = _fresh(runs[name])
        return -sum(fresh.values()) / len(fresh) if fresh else 1.0

    return sorted(runs, key=rank)


def _cells(name: str, runs: Runs) -> list[str]:
    own, row, fresh = runs[name], ROWS[name], _fresh(runs[name])
    shared = f", {row.queries_per_kv_head} queries a head" * (row.queries_per_kv_head > 1)
    return [
        f"`{name}`",
        f"`{row.layout}`{shared}",
        f"{confirmation.cache_share(name):.3g}",
        _first(own),
        ", ".join(map(str, fresh)),
        f"{Estimate.of([*fresh.values()]).mean:.3f}" if fresh else "",
        f"{min(fresh.values()):.3f} to {max(fresh.values()):.3f}" if fresh else "",
        *(difference(fresh, _fresh(runs[other]), 3) for other in AGAINST),
    ]


def _first(own: Mapping[int, Document]) -> str:
    return f"{worker.mean(own[CHOICE]['final']):.3f}" if CHOICE in own else ""


def draw(runs: Runs, path: pathlib.Path) -> None:
    """Accuracy of every run on fresh seeds, and the means against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    ends, curves = figure.subplots(1, 2, width_ratios=[1, 1.4])
    names = [name for name in _ranked(runs) if _fresh(runs[name])]
    for place, name in enumerate(names):
        fresh = _fresh(runs[name])
        ends.plot([*fresh.values()], [place] * len(fresh), "o", color=f"C{place}", alpha=0.6)
        ends.plot(np.mean([*fresh.values()]), place, "|", color="black", markersize=18)
        _draw_curve(curves, name, [runs[name][seed] for seed in fresh], f"C{place}")
    ends.set_yticks(range(len(names)), [f"{n} ({confirmation.cache_share(n):.2g})" for n in names])
    ends.invert_yaxis()
    ends.set_xlabel(f"accuracy after {STEPS:,} steps")
    ends.set_title("runs with fresh seeds, | their mean (share of mha's cache)", fontsize=10)
    curves.set_xlabel("step")
    curves.set_title(
        f"{DEEPER.layers} layers of width {DEEPER.width}: means while they train", fontsize=10
    )
    curves.legend(fontsize=8)
    for axes in (ends, curves):
        axes.grid(alpha=0.3)
    ends.set_xlim(0, 1)
    curves.set_ylim(0, 1)
    figure.savefig(path, dpi=110)


def _draw_curve(axes: Axes, name: str, records: Sequence[Document], color: str) -> None:
    steps = [look["step"] for look in records[0]["curve"]]
    seen = [[worker.mean(look["accuracy"]) for look in record["curve"]] for record in records]
    label = f"{name}, {len(seen)} runs" if len(seen) > 1 else f"{name}, 1 run"
    axes.plot(steps, np.mean(seen, axis=0), color=color, linewidth=1.5, label=label)
