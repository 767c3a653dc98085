"""The table and the picture of the search, from its records alone."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from experiments.study import tables
from experiments.study.retrieval.candidates import BUDGET, LENGTH, ROWS
from experiments.study.retrieval.results import BySeed, Result, front, paired
from experiments.study.retrieval.search import RUNGS
from experiments.study.statistics import CONFIDENCE, Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

FRESH = RUNGS[-1].seeds  # no layout was chosen by them
AGAINST = ("mha", "fusedkv")
_HEAD = (
    "name",
    "layout",
    "cache, of mha's",
    f"accuracy, {RUNGS[0].steps:,} steps",
    f"accuracy, {RUNGS[1].steps:,} steps",
    "on fresh seeds",
    *(f"minus {name}" for name in AGAINST),
    "loss",
    *(f"minus {name}" for name in AGAINST),
    "on the front",
)


def write(found: Sequence[Result], target: pathlib.Path) -> str:
    """Write table.md and front.png; returns the table's text."""
    target.mkdir(parents=True, exist_ok=True)
    text = markdown(found)
    (target / "table.md").write_text(text, encoding="utf-8")
    draw(found, target / "front.png")
    return text


def markdown(found: Sequence[Result]) -> str:
    """The results as a Markdown document."""
    by_name, best = {result.name: result for result in found}, front(found)
    rows = [
        _cells(result, by_name, result.name in best)
        for result in sorted(found, key=lambda result: (not result.fits, -_rank(result)))
        if result.screened is not None or result.accuracy
    ]
    return "\n".join(
        [
            "# Study: retrieval",
            "",
            f"Layouts of four layers; the cache is counted at {LENGTH} tokens, and those with more "
            f"than {BUDGET:.0%} of `mha`'s come last. Accuracy is the mean over six recall tasks, "
            "loss is in nats per token of held-out text, of another model of four layers. A number "
            f"in brackets is how many seeds a mean has. Fresh seeds are "
            f"{', '.join(map(str, FRESH))}: nothing was chosen by them. Differences are of runs "
            "with equal seeds, in accuracy the fresh ones alone (nothing was chosen by a loss), "
            f"± half of the {CONFIDENCE:.0%} interval by Student's t; "
            "**bold** where it excludes zero, with no correction for the number of comparisons. "
            "The front is that of the first rung: one run of each layout on either axis.",
            "",
            *tables.markdown(_HEAD, rows, words=(0, 1, len(_HEAD) - 1)),
            "",
        ]
    )


def _rank(result: Result) -> float:
    """Of the longest runs that a layout has; those that went on come before the others."""
    if result.accuracy:
        return 1 + Estimate.of([*result.accuracy.values()]).mean
    return result.screened or 0.0


def _cells(result: Result, by_name: dict[str, Result], best: bool) -> list[str]:
    row = ROWS[result.name]
    shared = f", {row.queries_per_kv_head} queries a head" * (row.queries_per_kv_head > 1)
    fresh = _fresh(result)
    others = [by_name[name] for name in AGAINST]
    return [
        f"`{result.name}`",
        f"`{row.layout}`{shared}",
        f"{result.cache:.3g}",
        "" if result.screened is None else f"{result.screened:.3f}",
        _mean(result.accuracy),
        _mean(fresh),
        *(difference(fresh, _fresh(other), 3) for other in others),
        _mean(result.loss),
        *(difference(result.loss, other.loss, 4) for other in others),
        "yes" if best else "",
    ]


def _mean(values: BySeed) -> str:
    return f"{Estimate.of([*values.values()]).mean:.3f} ({len(values)})" if values else ""


def _fresh(result: Result) -> BySeed:
    return {seed: result.accuracy[seed] for seed in FRESH if seed in result.accuracy}


def difference(ours: BySeed, theirs: BySeed, digits: int) -> str:
    """Ours minus theirs on equal seeds with its interval, bold where that excludes zero."""
    return "" if ours == theirs else tables.difference(paired(ours, theirs), digits)


def draw(found: Sequence[Result], path: pathlib.Path) -> None:
    """Accuracy of the short runs, the same against loss with the front, and the long runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 5.5), layout="constrained")
    bars, first, later = figure.subplots(1, 3, width_ratios=[1, 1.3, 1.3])
    screened = sorted(
        ((result.screened, result) for result in found if result.screened is not None),
        key=lambda pair: pair[0],
    )
    bars.barh(
        [f"{result.name} ({result.cache:.3g})" for _, result in screened],
        [accuracy for accuracy, _ in screened],
        color=[_color(result) for _, result in screened],
    )
    bars.set_xlabel(f"accuracy after {RUNGS[0].steps:,} steps, seed {RUNGS[0].seeds[0]}")
    bars.set_title("first rung (share of mha's cache)", fontsize=10)
    bars.tick_params(axis="y", labelsize=8)
    short = {result.name: result.place for result in found if result.place}
    long = {result.name: _middle(result) for result in found if result.accuracy and result.loss}
    for result in found:
        if result.name in short:
            first.plot(*short[result.name], "o", color=_color(result))
        if result.name in long:
            _with_ranges(later, result)
    best = sorted(result.place for result in found if result.place and result.name in front(found))
    if best:
        first.step(*zip(*best, strict=True), where="post", color="C0", linewidth=1, zorder=1)
    first.set_title("one run on either axis; blue: within the budget, with its front", fontsize=10)
    later.set_title(
        f"{RUNGS[1].steps:,} steps: means over seeds, bars from lowest to highest", fontsize=10
    )
    for axes in (first, later):
        axes.set_xlabel("held-out loss (nats per token)")
        axes.set_ylabel("accuracy")
        axes.grid(alpha=0.3)
        axes.margins(0.1)
    figure.draw_without_rendering()  # the layout must stand before names find room in it
    for axes, places in ((first, short), (later, long)):
        name_points(axes, places)
    figure.savefig(path, dpi=110)


def _middle(result: Result) -> tuple[float, float]:
    """Means of loss and accuracy."""
    loss, accuracy = (Estimate.of([*v.values()]).mean for v in (result.loss, result.accuracy))
    return loss, accuracy


def _with_ranges(axes: Axes, result: Result) -> None:
    middle = _middle(result)
    ranges = [
        [[mean - min(values.values())], [max(values.values()) - mean]]
        for mean, values in zip(middle, (result.loss, result.accuracy), strict=True)
    ]
    color = _color(result)
    axes.errorbar(*middle, *ranges[::-1], fmt="o", color=color, elinewidth=0.6, capsize=2)


def name_points(axes: Axes, places: Mapping[str, tuple[float, float]]) -> list[Annotation]:
    """Write each name beside its point, at the first of some places where it is inside of the axes
    and covers no other name, point or line; at the first of all if there is none."""
    from matplotlib.transforms import Bbox

    corners = [(x, y, side) for y in (4, -11, 12, -19) for x, side in ((5, "left"), (-5, "right"))]
    points = axes.transData.transform([*places.values()])
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in points]
    lines = [line.get_path().transformed(line.get_transform()) for line in axes.lines]
    drawn = []

    def free(box: Bbox) -> bool:
        inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
        crossed = any(line.intersects_bbox(box, filled=False) for line in lines)
        return inside and not crossed and not box.count_overlaps(taken)

    for name, place in places.items():
        tried = [
            axes.annotate(name, place, (x, y), textcoords="offset points", fontsize=7, ha=side)
            for x, y, side in corners
        ]
        boxes = [text.get_window_extent() for text in tried]
        best = next((i for i, box in enumerate(boxes) if free(box)), 0)
        taken.append(boxes[best])
        drawn.append(tried[best])
        for text in tried:
            if text is not tried[best]:
                text.remove()
    return drawn


def _color(result: Result) -> str:
    return "C0" if result.fits else "gray"
