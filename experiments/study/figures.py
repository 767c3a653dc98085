"""The pictures of a study: loss against size, cache and FLOPs, and the paired differences."""

import pathlib
from collections.abc import Callable, Sequence

from experiments.study.grid import Study
from experiments.study.statistics import Line

_COSTS: dict[str, Callable[[Line], float]] = {
    "parameters without embedding and head": lambda line: line.record["non_embedding_parameters"],
    "cache, bytes per token": lambda line: line.record["cache_bytes_per_token"],
    "training FLOPs": lambda line: line.record["train_flops"],
}


def draw_losses(study: Study, results: Sequence[Line], path: pathlib.Path) -> None:
    """Held-out loss against each cost, a line for each row; bars are confidence intervals."""
    from matplotlib import colormaps, ticker
    from matplotlib.figure import Figure

    pairs = colormaps["tab20"]  # each color, and a pale one of it
    colors = [pairs(i) for i in (*range(0, 20, 2), *range(1, 20, 2))]
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    panels = figure.subplots(1, len(_COSTS), sharey=True)
    for axes, (label, cost) in zip(panels, _COSTS.items(), strict=True):
        for number, row in enumerate(study.rows):
            own = [line for line in results if line.row == row]
            if own:
                axes.errorbar(
                    [cost(line) for line in own],
                    [line.loss.mean for line in own],
                    yerr=[line.loss.half_width or 0.0 for line in own],
                    marker="osD^v<>PX*hdp"[number % 13],
                    color=colors[number % len(colors)],
                    capsize=3,
                    label=row,
                    alpha=0.85,
                )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())  # labels would run into each other
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss (nats per token)")
    if results:
        panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_differences(study: Study, results: Sequence[Line], path: pathlib.Path) -> None:
    """Paired differences with their intervals: a panel for each row compared with."""
    versus = (study.reference, study.equal_cache)
    count = max(len(results), 1)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.3 * count), layout="constrained")
    panels = figure.subplots(1, len(versus), sharey=True)
    order = list(reversed(results))
    for axes, name in zip(panels, versus, strict=True):
        for place, line in enumerate(order):
            found = line.against.get(name)
            if found is not None:
                color = f"C{list(study.sizes).index(line.size)}"
                bar = found.half_width or 0.0
                axes.errorbar(found.mean, place, xerr=bar, fmt="o", color=color, capsize=3)
        axes.axvline(0.0, color="gray", linewidth=1)
        axes.set_title(f"loss minus {name} (nats per token)")
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(order)), [f"{line.row}, {line.size}" for line in order])
    figure.savefig(path, dpi=120)
