"""The table and the picture of the runs with more layers, from their records alone."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments.common.documents import Document
from experiments.study import tables
from experiments.study.recall import worker
from experiments.study.recall.cells import Cell
from experiments.study.retrieval import confirmation
from experiments.study.retrieval.confirmation import (
    CHOICE,
    FORMS,
    LENGTH,
    ROWS,
    STEPS,
    TRIALS,
    Trial,
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
)
Runs = Mapping[str, Mapping[int, Document]]  # records by layout and seed


def read(folder: pathlib.Path) -> dict[Trial, Runs]:
    """The finished runs of each layout in each trial, in the order of `ROWS`.

    Raises:
      ValueError: a file is no record.
    """
    records = {Cell.from_dict(r["cell"]): r for r in worker.read_all(folder / "recall")}

    def finished(name: str, trial: Trial) -> dict[int, Document]:
        seeds = (CHOICE, *trial.seeds)
        cells = {seed: confirmation.cell(name, seed, trial.size) for seed in seeds}
        return {seed: records[cell] for seed, cell in cells.items() if cell in records}

    return {trial: {name: finished(name, trial) for name in ROWS} for trial in TRIALS}


def write(found: Mapping[Trial, Runs], target: pathlib.Path) -> str:
    """Write confirmation.md, and confirmation.png if there are runs; returns the table's text."""
    target.mkdir(parents=True, exist_ok=True)
    text = markdown(found)
    (target / "confirmation.md").write_text(text, encoding="utf-8")
    drawn = {trial: runs for trial, runs in found.items() if any(map(_fresh, runs.values()))}
    if drawn:
        draw(drawn, target / "confirmation.png")
    return text


def markdown(found: Mapping[Trial, Runs]) -> str:
    """The runs of all trials as a Markdown document."""
    lines = [
        "# Study: retrieval, with more layers",
        "",
        f"{STEPS:,} steps on {LENGTH} tokens, at which length the cache is counted. Accuracy is "
        f"the mean over six recall tasks. Seed {CHOICE} chose between the forms of the search's "
        f"best layout ({' and '.join(f'`{name}`' for name in FORMS)}) at the first size; by the "
        "others, fresh seeds, nothing was chosen, and the columns after theirs "
        "are of these alone. The second trial was decided when the first was known, the third when "
        "both were. Differences are of runs with equal seeds, "
        f"± half of the {CONFIDENCE:.0%} interval by Student's t; **bold** where it excludes "
        "zero, with no correction for the number of comparisons.",
        "",
    ]
    for trial, runs in found.items():
        rows = [_cells(name, runs) for name in _ranked(runs) if runs[name]]
        lines += [f"## {trial}", "", *tables.markdown(_HEAD, rows, words=(0, 1)), ""]
    return "\n".join(lines)


def _fresh(own: Mapping[int, Document]) -> BySeed:
    return {seed: worker.mean(own[seed]["final"]) for seed in sorted(own) if seed != CHOICE}


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


def draw(found: Mapping[Trial, Runs], path: pathlib.Path) -> None:
    """For each trial, accuracy of every run on fresh seeds, and the means against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.6 + 3.8 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 2, width_ratios=[1, 1.4], squeeze=False)
    for (trial, runs), (ends, curves) in zip(found.items(), panels, strict=True):
        _draw_trial(runs, ends, curves)
        ends.set_title("fresh seeds, | their mean (share of mha's cache)", fontsize=10)
        curves.set_title(f"{trial}: means", fontsize=9)
    figure.savefig(path, dpi=110)


def _draw_trial(runs: Runs, ends: Axes, curves: Axes) -> None:
    names = [name for name in _ranked(runs) if _fresh(runs[name])]
    for place, name in enumerate(names):
        fresh, color = _fresh(runs[name]), f"C{[*ROWS].index(name)}"
        ends.plot([*fresh.values()], [place] * len(fresh), "o", color=color, alpha=0.6)
        ends.plot(np.mean([*fresh.values()]), place, "|", color="black", markersize=18)
        _draw_curve(curves, name, [runs[name][seed] for seed in fresh], color)
    ends.set_yticks(range(len(names)), [f"{n} ({confirmation.cache_share(n):.2g})" for n in names])
    ends.invert_yaxis()
    ends.set_xlabel(f"accuracy after {STEPS:,} steps")
    curves.set_xlabel("step")
    curves.legend(fontsize=8)
    for axes in (ends, curves):
        axes.grid(alpha=0.3)
    ends.set_xlim(0, 1)
    curves.set_ylim(0, 1)


def _draw_curve(axes: Axes, name: str, records: Sequence[Document], color: str) -> None:
    steps = [look["step"] for look in records[0]["curve"]]
    seen = [[worker.mean(look["accuracy"]) for look in record["curve"]] for record in records]
    label = f"{name}, {len(seen)} runs" if len(seen) > 1 else f"{name}, 1 run"
    axes.plot(steps, np.mean(seen, axis=0), color=color, linewidth=1.5, label=label)
