"""The tables and curves of the study, from its records alone."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence

from experiments.common.documents import Document
from experiments.study import tables
from experiments.study.recall import worker
from experiments.study.recall.cells import Cell
from experiments.study.recall.questions import QUESTIONS, Question

LEARNED = 0.5  # mean accuracy from which a run counts as having learned
Group = list[tuple[Cell, Document]]  # runs that differ by their seed alone


def write(source: pathlib.Path, target: pathlib.Path) -> str:
    """Write table.md and curves.png from the records of a folder; returns the table's text.

    Raises:
      ValueError: the folder holds no records, or others.
    """
    found = worker.read_all(source)
    if not found:
        raise ValueError(f"{source} holds no records of --study=recall; run the study first")
    target.mkdir(parents=True, exist_ok=True)
    text = markdown(found)
    (target / "table.md").write_text(text, encoding="utf-8")
    draw(found, target / "curves.png")
    return text


def summary(source: pathlib.Path) -> dict[str, float]:
    """The accuracy at the end of each recorded run."""
    found = worker.read_all(source)
    return {Cell.from_dict(record["cell"]).name: worker.mean(record["final"]) for record in found}


def groups(question: Question, found: Iterable[Document]) -> list[Group]:
    """The finished runs of a question, in its order."""
    records = {Cell.from_dict(record["cell"]): record for record in found}
    joined: dict[Cell, Group] = {}
    for cell in question.cells:
        if cell in records:
            like = dataclasses.replace(cell, seed=0)
            joined.setdefault(like, []).append((cell, records[cell]))
    return list(joined.values())


def learned_at(record: Document) -> int | None:
    """The first look, by its step, at which the model answers half of all questions."""
    return next(
        (look["step"] for look in record["curve"] if worker.mean(look["accuracy"]) >= LEARNED),
        None,
    )


def markdown(found: Sequence[Document]) -> str:
    """The records as a Markdown document."""
    parts = [
        "# Study: recall",
        "",
        "Accuracy is the mean over the six recall tasks at the end of training, "
        f"{worker.EXAMPLES['final']} examples of each, every answer given the right ones before "
        "it; the range is over seeds. A run has learned at the first of "
        f"{worker.LOOKS} equally spaced looks, at {worker.EXAMPLES['curve']} examples of each, "
        f"with an accuracy of {LEARNED:g} or more. Attention is that of the best head of each "
        "layer at the end, the mean over seeds: to the token before, and to the token after an "
        "earlier place of the same token.",
    ]
    for question in QUESTIONS:
        runs = groups(question, found)
        rows = [_cells(group) for group in runs]
        if rows:
            there, planned = sum(map(len, runs)), len(question.cells)
            parts += [
                "",
                f"## {question.title}",
                "",
                f"{question.text} {there} of {planned} planned runs are there.",
                "",
                *tables.markdown(_HEAD, rows, _WORDS),
            ]
    return "\n".join([*parts, "", *_where(found), ""])


_HEAD = (
    "layout",
    "framework",
    "rate",
    "other settings",
    "seeds",
    "accuracy",
    "min to max",
    "learned",
    "at step",
    "to the token before",
    "induction",
)
_WORDS = (0, 1, 3)  # columns that hold no numbers


def _cells(group: Group) -> list[str]:
    cell, records = group[0][0], [record for _, record in group]
    finals = [worker.mean(record["final"]) for record in records]
    steps = [step for record in records if (step := learned_at(record)) is not None]
    changed = ", ".join(f"{name}={value:g}" for name, value in cell.changes().items())
    return [
        cell.layout,
        cell.framework,
        f"{cell.learning_rate:g}",
        changed,
        ", ".join(str(other.seed) for other, _ in group),
        f"{sum(finals) / len(finals):.3f}",
        f"{min(finals):.3f} to {max(finals):.3f}",
        f"{len(steps)} of {len(group)}",
        ", ".join(f"{step:,}" for step in steps),
        _shares(records, "previous"),
        _shares(records, "induction"),
    ]


def _shares(records: Sequence[Document], name: str) -> str:
    ends = [record["curve"][-1][name] for record in records if name in record["curve"][-1]]
    return " ".join(f"{sum(layer) / len(ends):.2f}" for layer in zip(*ends, strict=True))


def _where(found: Sequence[Document]) -> list[str]:
    names = ("processor", "python", "jax", "torch")
    places = {
        ", ".join(f"{name} {record['environment'].get(name)}" for name in names) for record in found
    }
    return [f"{len(found)} runs on {'; '.join(sorted(places))}. Each record names its commit."]


def draw(found: Sequence[Document], path: pathlib.Path) -> None:
    """Accuracy against steps: a panel for each question, a color for each of its settings."""
    from matplotlib.figure import Figure

    drawn = [(question, groups(question, found)) for question in QUESTIONS]
    drawn = [(question, runs) for question, runs in drawn if runs]
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    for (question, runs), axes in zip(drawn, panels, strict=False):  # in this order: none is lost
        for number, group in enumerate(runs):
            for place, (cell, record) in enumerate(group):
                axes.plot(
                    [look["step"] for look in record["curve"]],
                    [worker.mean(look["accuracy"]) for look in record["curve"]],
                    color=f"C{number % 10}",
                    linestyle="-" if number < 10 else "--",
                    linewidth=1.2,
                    label=question.label(cell) if place == 0 else None,
                )
        axes.set_title(question.title, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    for axes in list(panels):
        axes.set_visible(False)
    figure.supylabel("accuracy, mean over the tasks")
    figure.savefig(path, dpi=110)
