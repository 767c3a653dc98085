"""The tables and pictures of the study "paper", from its records and those of `scaling` alone."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import experiments
from experiments.study import records, tables
from experiments.study.grid import Seeds
from experiments.study.paper import figures, grids
from experiments.study.paper.shares import shares_of
from experiments.study.records import Record
from experiments.study.statistics import CONFIDENCE, Estimate, finite_losses, paired

_COMMITTED = pathlib.Path(experiments.__file__).parent / "results" / "study"
_WORDS = (0, 1)  # columns of the tables that hold no numbers
# What each row of the ablation reads in its upper layers.
_MEANING = {
    "mha": "streams of its own: the whole cache",
    "fusedkv": "both sources, learned weights of each channel (`equivalent`)",
    "iterative": "the same, trained as factors of a recursion over depth",
    "normal": "the same, drawn from N(0, 1) without the recursion",
    "lite_learnable": "middle keys, lowest values, learned weights of each channel",
    "fusedkv_lite": "middle keys, lowest values",
    "yoco": "middle keys, middle values",
    "lite_reversed": "lowest keys, middle values",
}


@dataclasses.dataclass(frozen=True)
class Found:
    """The records there are.

    Attributes:
      ablation, depth: of this study.
      shared: of `scaling`.
    """

    ablation: list[Record]
    depth: list[Record]
    shared: list[Record]

    def losses(self) -> dict[str, dict[Seeds, float]]:
        """Finite losses of the ablation by row and draw, rows without any left out."""
        rows: dict[str, dict[Seeds, Record]] = {row: {} for row in _MEANING}
        for record in (*self.shared, *self.ablation):
            cell = records.cell_of(record)
            rows[cell.row][cell.draw] = record
        losses = {row: finite_losses(own) for row, own in rows.items()}
        return {row: own for row, own in losses.items() if own}


def read(folder: pathlib.Path) -> Found:
    """The records of a folder, and the committed ones of `scaling`.

    Raises:
      ValueError: it has none, or others.
    """
    found = Found(
        records.read_all(folder / "ablation", grids.ablation()),
        records.read_all(folder / "depth", grids.depth()),
        grids.shared(_COMMITTED / "scaling" / "records"),
    )
    if not found.ablation and not found.depth:
        raise ValueError(f"{folder} holds no records of --study=paper; run the study first")
    return found


def write(found: Found, target: pathlib.Path) -> str:
    """Write table.md and the pictures that there are records for; returns the table's text."""
    target.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*_ablation(found.losses()), *_depth(found.depth), ""])
    (target / "table.md").write_text(text, encoding="utf-8")
    figures.draw_ablation(
        {row: against(found.losses(), row, grids.REFERENCE) for row in found.losses()},
        target / "ablation.png",
    )
    figures.draw_shares(of_row(found.depth, "dense_fusion"), target / "dense_fusion.png")
    figures.draw_gradients(
        {row: of_row(found.depth, row) for row in ("mha", "fusedkv")}, target / "gradients.png"
    )
    return text


def against(losses: Mapping[str, Mapping[Seeds, float]], row: str, other: str) -> Estimate | None:
    """A row's loss minus another's on equal draws; None for the same row, or without any."""
    if row == other or other not in losses:
        return None
    return paired(losses[row], losses[other])


def of_row(found: Sequence[Record], row: str) -> dict[int, Record]:
    """The records of a row that did not diverge, by seed."""
    cells = [(records.cell_of(record), record) for record in found]
    return {cell.draw.seed: r for cell, r in cells if cell.row == row and inside(r)}


def inside(record: Record) -> bool:
    """Whether a record says what is inside: that of a diverged run does not."""
    return record["inside"] is not None


def _ablation(losses: Mapping[str, Mapping[Seeds, float]]) -> list[str]:
    size = grids.ablation().sizes[grids.SIZE]
    versus = (grids.REFERENCE, "mha")
    rows = [
        [
            f"`{row}`",
            _MEANING[row],
            str(len(own)),
            tables.mean(Estimate.of([*own.values()])),
            *(tables.difference(against(losses, row, other)) for other in versus),
        ]
        for row, own in losses.items()
    ]
    head = ["layout", "the upper layers read", "runs", "loss", *(f"minus {n}" for n in versus)]
    return [
        "# Study: paper",
        "",
        "## Ablation",
        "",
        f"{size.model.num_layers} layers of width {size.model.d_model}, "
        f"{grids.ablation().tokens(grids.SIZE):,} tokens, learning rate {grids.RATE}, held-out "
        "loss in nats per token. Differences are of runs with equal draws, ± half of the "
        f"{CONFIDENCE:.0%} interval by Student's t; **bold** where it excludes zero, with no "
        f"correction for the number of comparisons. {', '.join(grids.SHARED)} are of `scaling`.",
        "",
        *tables.markdown(head, rows, _WORDS),
        "",
    ]


def _depth(found: Sequence[Record]) -> list[str]:
    size, study = grids.depth().sizes[grids.DEEP], grids.depth()
    runs = [
        [
            f"`{row}`",
            str(seed),
            f"{records.loss_of(record):.4f}",
            *_last_gradients(record),
        ]
        for row in grids.DEPTH
        for seed, record in of_row(found, row).items()
    ]
    shares = [
        [
            f"`{row}`",
            str(seed),
            f"{share.kind}s of layer {share.layer}",
            *(
                f"{mean:+.2f} ({weight:.0%}, {size:.0%})"
                for mean, weight, size in zip(
                    share.means, share.by_weight, share.by_size, strict=True
                )
            ),
        ]
        for row in grids.DEPTH
        for seed, record in of_row(found, row).items()
        for share in shares_of(record)
    ]
    sources = max((len(cells) - 3 for cells in shares), default=0)
    layers = range(size.model.num_layers)
    return [
        f"## {size.model.num_layers} layers",
        "",
        f"Width {size.model.d_model}, {study.tokens(grids.DEEP):,} tokens, the same rate. Norms of "
        "the gradient of the held-out loss after the last step, of each layer's parameters:",
        "",
        *tables.markdown(["layout", "seed", "loss", *(f"layer {i}" for i in layers)], runs, _WORDS),
        "",
        "Mean weight of each source, from the lowest up. In brackets the share of its root mean "
        "square over channels in the sum over sources, by itself and times the root mean square "
        "of the source's stream.",
        "",
        *tables.markdown(["layout", "seed", "stream", *["source"] * sources], shares, _WORDS),
        "",
    ]


def _last_gradients(record: Record) -> list[str]:
    return [f"{norm:.4f}" for norm in record["inside"]["gradients"][-1]["all"]]
