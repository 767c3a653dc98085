"""Where differences from the reference come from: its tables, by groups of targets."""

from collections.abc import Iterator, Mapping, Sequence

from experiments.study import plan, recalled, records, tables
from experiments.study.grid import Seeds, Study
from experiments.study.statistics import Estimate, draws

Draws = Mapping[Seeds, records.Record]


def markdown(study: Study, found: Sequence[records.Record], size: str) -> list[str]:
    """The lines of a table for each text, of the runs whose records know their groups."""
    rate = plan.tuned_rate(study, records.losses(found), size, study.reference)
    known = {records.cell_of(record): record for record in found if record.get("groups")}
    if rate is None or not known:
        return []
    rows = {row: draws(study, known, size, row, rate) for row in study.rows}
    reference = rows.pop(study.reference)
    pairs = {row: own for row, own in rows.items() if own.keys() & reference.keys()}
    if not pairs:
        return []
    return list(_tables(study, pairs, reference))


def _tables(study: Study, pairs: Mapping[str, Draws], reference: Draws) -> Iterator[str]:
    head = ["row", "draws", *recalled.GROUPS, *(f"{name} in all" for name in recalled.GROUPS)]
    for text in next(iter(reference.values()))["groups"]:
        yield from ("", _sizes(text, study.reference, reference), "")
        rows = [[row, *_cells(text, own, reference)] for row, own in pairs.items()]
        yield from tables.markdown(head, rows)


def _sizes(text: str, name: str, reference: Draws) -> str:
    texts = [record["groups"][text] for record in reference.values()]
    targets = sum(group["targets"] for group in texts[0].values())
    sizes = [
        f"{group} {texts[0][group]['targets'] / targets:.1%} "
        f"({tables.mean(Estimate.of([found[group]['loss'] for found in texts]))})"
        for group in texts[0]
    ]
    return (
        f"The targets of {text} in groups, by whether the pair with the token before stands "
        f"earlier in the context, and {name}'s loss on each: {', '.join(sizes)}. Losses minus "
        f"{name}'s in each group, and what that makes in the mean over all targets:"
    )


def _cells(text: str, own: Draws, reference: Draws) -> list[str]:
    common = [draw for draw in own if draw in reference]
    differences: dict[str, Estimate] = {}
    parts: dict[str, float] = {}
    groups = own[common[0]]["groups"][text]
    targets = sum(group["targets"] for group in groups.values())
    for name, group in groups.items():
        ours, theirs = (
            [found[draw]["groups"][text][name]["loss"] for draw in common]
            for found in (own, reference)
        )
        differences[name] = Estimate.of([a - b for a, b in zip(ours, theirs, strict=True)])
        parts[name] = group["targets"] / targets * differences[name].mean
    return [
        str(len(common)),
        *(tables.difference(differences.get(name)) for name in recalled.GROUPS),
        *(f"{parts[name]:+.4f}" if name in parts else "" for name in recalled.GROUPS),
    ]
