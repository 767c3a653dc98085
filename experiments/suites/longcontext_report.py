"""What the long-context suite writes: a table for each model, and quality against cache bytes."""

import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.common.documents import Row

Points = tuple[tuple[float, float], ...]
_MARKERS = "osD^v<>PX*"


def markdown(results: Row) -> str:
    """The results as a Markdown document: a table for each model."""
    settings, environment = results["settings"], results["environment"]
    lines = [
        "# Long-context suite",
        "",
        f"{settings['examples']} examples of {settings['length']} tokens a task, seed "
        f"{settings['seed']}, question {settings['question']} the prompt; "
        f"{environment['device']} ({environment['processor']}), jax {environment['jax']}.",
        "",
        "Bytes are those of the arrays that hold the cache, room for the answers included, over "
        "the whole cache's. KL (nats) and top-1 agreement compare the predictions of the answers "
        "with those of the whole cache; columns of tasks are accuracies, for text the perplexity, "
        "for RULER's tasks the share of right answers in the text that the model writes.",
    ]
    for layout, model in results["models"].items():
        tasks = list(model["tasks"])
        lines += ["", f"## {layout}", ""]
        head = ["method", "bytes", "accuracy", "KL", "top-1", *tasks]
        lines += [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
        for row in results["rows"]:
            if row["layout"] == layout and not row["refused"]:
                lines.append(_line([row["method"], *_cells(row, tasks)]))
        refused = [row for row in results["rows"] if row["layout"] == layout and row["refused"]]
        if refused:
            reasons = {row["refused"].split(":")[0]: row["refused"] for row in refused}
            lines += ["", "Not for this layout: " + "; ".join(reasons.values()) + "."]
    return "\n".join(lines) + "\n"


def _cells(row: Row, tasks: Sequence[str]) -> list[str]:
    accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
    cells = [f"{row['bytes_ratio']:.3f}", accuracy, f"{row['kl']:.2g}", f"{row['top1']:.3f}"]
    for task in tasks:
        score = row["tasks"][task]
        perplexity = f"{np.exp(score['loss']):.3f}"
        cells.append(perplexity if score["accuracy"] is None else f"{score['accuracy']:.3f}")
    return cells


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def draw(results: Row, path: pathlib.Path) -> None:
    """Write a picture of quality against cache bytes, a panel for each model."""
    models = list(results["models"])
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(models), 5), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    rows = [row for row in results["rows"] if not row["refused"]]
    quality = "top1" if any(row["accuracy"] is None for row in rows) else "accuracy"
    families = list(dict.fromkeys(row["family"] for row in rows))
    for axes, model in zip(panels, models, strict=True):
        curves = {}
        for family in families:
            own = [row for row in rows if (row["layout"], row["family"]) == (model, family)]
            own.sort(key=lambda row: (row["bytes_ratio"], row[quality]))
            if family == "storage type":  # one by one: they are no curve
                curves |= {row["method"]: _points([row], quality) for row in own}
            elif own:
                curves[family] = _points(own, quality)
        for number, (points, names) in enumerate(coinciding(curves).items()):
            style = f"{_MARKERS[number % len(_MARKERS)]}-"
            # Hollow, so that a point shows what is under it.
            axes.plot(*zip(*points, strict=True), style, mfc="none", label=" = ".join(names))
        axes.set_title(model)
        axes.set_xlabel("cache bytes over those of the whole cache")
        axes.set_ylabel("agreement (top-1)" if quality == "top1" else "mean accuracy")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def coinciding(curves: Mapping[str, Points]) -> dict[Points, list[str]]:
    """The names of each curve; curves that are equal are drawn once, under all their names."""
    names: dict[Points, list[str]] = {}
    for name, points in curves.items():
        names.setdefault(points, []).append(name)
    return names


def _points(rows: Sequence[Row], quality: str) -> Points:
    return tuple((row["bytes_ratio"], row[quality]) for row in rows)


def write(results: Row, folder: pathlib.Path) -> None:
    """Leave longcontext.json, longcontext.md and longcontext.png in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    (folder / "longcontext.json").write_text(text, encoding="utf-8")
    (folder / "longcontext.md").write_text(markdown(results), encoding="utf-8")
    draw(results, folder / "longcontext.png")
