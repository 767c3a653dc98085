"""The tables of a study, from its records alone."""

import collections
import pathlib
from collections.abc import Mapping, Sequence

from experiments.study import figures, group_table, plan, records, speed, tables
from experiments.study.grid import Study
from experiments.study.statistics import CONFIDENCE, Line, lines, without_loss


def write(study: Study, source: pathlib.Path, target: pathlib.Path) -> str:
    """Write tables and pictures from the records of a folder; returns the text of table.md."""
    found = records.read_all(source, study)
    if not found:
        raise ValueError(f"{source} holds no records of --study={study.name}; run the study first")
    target.mkdir(parents=True, exist_ok=True)
    text = markdown(study, found)
    (target / "table.md").write_text(text, encoding="utf-8")
    results = lines(study, found)
    figures.draw_losses(study, results, target / "losses.png")
    figures.draw_differences(study, results, target / "differences.png")
    (target / "speed.md").write_text(speed.markdown(study, results), encoding="utf-8")
    speed.draw(study, results, target / "speed.png")
    return text


def markdown(study: Study, found: Sequence[records.Record]) -> str:
    """The records as a Markdown document."""
    parts = [f"# Study: {study.name}", "", *_method(study), ""]
    results = lines(study, found)
    for size in study.sizes:
        of_size = [line for line in results if line.size == size]
        rates = _rates(study, found, size)
        if of_size or rates:
            lost = _lost(without_loss(study, found, size))
            groups = group_table.markdown(study, found, size)
            parts += [f"## {size}", "", *_size(study, size, of_size), *lost, *rates, *groups, ""]
    return "\n".join([*parts, *_where(found), ""])


def _method(study: Study) -> list[str]:
    return [
        f"{study.tokens_per_parameter} training tokens for each parameter of {study.reference} "
        "(embedding and head not counted), equally many for all rows of a size. Loss in nats per "
        f"token; means over finished draws (seed and order of the text), ± half of the "
        f"{CONFIDENCE:.0%} confidence interval by Student's t. Differences are of runs with equal "
        "draws; **bold** where the interval excludes zero. No correction for the number of "
        "comparisons.",
    ]


def _size(study: Study, size: str, of_size: Sequence[Line]) -> list[str]:
    chosen = study.sizes[size]
    text = (
        f"{chosen.parameters:,} parameters of {study.reference} without embedding and head, "
        f"{study.tokens(size):,} tokens in {study.steps(size):,} steps."
    )
    if not of_size:
        return [text, ""]
    versus = (study.reference, study.equal_cache)
    texts = sorted({name for line in of_size for name in line.others})
    head = ["row", "runs", "parameters", "cache, bytes per token", "training FLOPs", "loss"]
    head += [f"minus {name}" for name in versus]
    head += ["bits per byte", *(f"{name}, bits per byte" for name in texts)]
    rows = [[*_cells(line, versus), *_bits(line, texts)] for line in of_size]
    return [text, "", *tables.markdown(head, rows), ""]


def _cells(line: Line, versus: Sequence[str]) -> list[str]:
    record = line.record
    diverged = f" ({line.diverged} diverged)" if line.diverged else ""
    return [
        line.row,
        f"{line.loss.count}{diverged}",
        f"{record['non_embedding_parameters']:,}",
        f"{record['cache_bytes_per_token']:,}",
        f"{record['train_flops']:.3g}",
        tables.mean(line.loss),
        *(tables.difference(line.against.get(name)) for name in versus),
    ]


def _bits(line: Line, texts: Sequence[str]) -> list[str]:
    others = (line.others.get(name) for name in texts)
    return [
        tables.mean(line.bits_per_byte),
        *("" if bits is None else tables.mean(bits) for bits in others),
    ]


def _lost(rows: Mapping[str, int]) -> list[str]:
    """Names the rows that no mean has."""
    counts = ", ".join(f"{row} ({count})" for row, count in rows.items())
    return [f"All runs diverged, so that there is no loss: {counts}.", ""] if rows else []


def _rates(study: Study, found: Sequence[records.Record], size: str) -> list[str]:
    """What is known of the learning rate: the reference's search and the checks."""
    losses = records.losses(found)
    rows = collections.defaultdict(dict)
    for cell, loss in losses.items():
        if cell.size == size and cell.draw == study.draws[0]:
            rows[cell.row][cell.learning_rate] = loss
    tried = {row: values for row, values in rows.items() if len(values) > 1}
    rates = sorted({rate for values in tried.values() for rate in values})
    if not rates:
        return []
    chosen = plan.tuned_rate(study, losses, size, study.reference)
    state = "not yet tuned" if chosen is None else f"{chosen:g} is used"
    cells = [
        [row, *(f"{values[rate]:.4f}" if rate in values else "" for rate in rates)]
        for row, values in tried.items()
    ]
    return [
        f"Loss by learning rate, first draw ({state}):",
        "",
        *tables.markdown(["row", *(f"{rate:g}" for rate in rates)], cells),
    ]


def _where(found: Sequence[records.Record]) -> list[str]:
    """On what the runs were made, each combination once."""
    names = ("device", "processor", "cores", "python", "jax", "jaxlib", "flax", "optax")
    places = collections.Counter(
        ", ".join(f"{name} {record['environment'].get(name)}" for name in names) for record in found
    )
    texts = {record["corpus"]["tokenizer"][:12] for record in found}
    return [
        *(f"{count} runs on {place}." for place, count in places.items()),
        f"Tokenizer {', '.join(sorted(texts))}. Each record names its commit.",
    ]
