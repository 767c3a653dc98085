"""The pictures of the study "paper"."""

import pathlib
from collections.abc import Mapping

import numpy as np

from experiments.study.paper.shares import shares_of
from experiments.study.records import Record
from experiments.study.statistics import Estimate
from fusedkv_jax.layouts import KINDS


def draw_shares(runs: Mapping[int, Record], path: pathlib.Path) -> None:
    """Heat maps of what fused keys and values are made of, two columns of panels for each seed."""
    if not runs:
        return
    from matplotlib.figure import Figure

    titles = {"by_weight": "by weight", "by_size": "by weight times stream"}
    figure = Figure(figsize=(1.5 + 5.2 * len(runs), 5.6), layout="constrained")
    panels = figure.subplots(len(KINDS), len(titles) * len(runs), squeeze=False)
    columns = [(seed, record, by) for seed, record in runs.items() for by in titles]
    for column, (seed, record, by) in enumerate(columns):
        for axes, kind in zip(panels[:, column], KINDS, strict=True):
            rows = [share for share in shares_of(record) if share.kind == kind]
            parts = np.array([getattr(row, by) for row in rows])
            image = axes.imshow(parts, cmap="viridis", vmin=0, vmax=1, aspect="auto")
            axes.set_xticks(range(len(rows[0].sources)), rows[0].sources)
            axes.set_yticks(range(len(rows)), [row.layer for row in rows])
            axes.invert_yaxis()  # layer 0 is at the bottom of a model
            axes.set_title(f"{kind}s, seed {seed}, {titles[by]}", fontsize=8)
            for (row, place), part in np.ndenumerate(parts):
                color = "white" if part < 0.6 else "black"
                style = {"ha": "center", "va": "center", "fontsize": 8, "color": color}
                axes.text(place, row, f"{part:.0%}", **style)
    for axes in panels[-1]:
        axes.set_xlabel("source layer", fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("reading layer", fontsize=8)
    figure.colorbar(image, ax=panels, label="share of the fused stream")
    figure.savefig(path, dpi=110)


def draw_gradients(rows: Mapping[str, Mapping[int, Record]], path: pathlib.Path) -> None:
    """Norms of gradients by layer: means over checkpoints, a line for each run."""
    if not any(rows.values()):
        return
    from matplotlib.figure import Figure

    parts = {
        "all": "all parameters of a layer",
        "key": "key projection",
        "value": "value projection",
    }
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    for axes, (part, title) in zip(figure.subplots(1, len(parts)), parts.items(), strict=True):
        for number, (row, runs) in enumerate(rows.items()):
            for place, record in enumerate(runs.values()):
                steps = record["inside"]["gradients"]
                norms = [
                    np.nan if None in column else float(np.mean(column))
                    for column in zip(*(step[part] for step in steps), strict=True)
                ]
                label = row if place == 0 else None
                axes.plot(norms, "os"[number] + "-", color=f"C{number}", label=label, alpha=0.8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("layer")
        axes.locator_params(axis="x", integer=True)
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    axes = figure.axes[0]
    axes.set_ylabel("norm of the gradient, mean over training")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_ablation(differences: Mapping[str, Estimate | None], path: pathlib.Path) -> None:
    """Loss minus that of fusedkv on equal draws, with intervals."""
    from matplotlib.figure import Figure

    shown = {row: found for row, found in differences.items() if found is not None}
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, found in enumerate(shown.values()):
        axes.errorbar(
            found.mean, place, xerr=found.half_width or 0.0, fmt="o", color="C0", capsize=3
        )
    axes.set_yticks(range(len(shown)), [f"{row} ({e.count})" for row, e in shown.items()])
    axes.invert_yaxis()
    axes.axvline(0.0, color="gray", linewidth=1)
    axes.set_xlabel("held-out loss minus that of fusedkv (nats per token); runs in brackets")
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)
