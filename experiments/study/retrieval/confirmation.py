"""The search's best layout with more layers: what it becomes there, and whether it holds."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from experiments.study.grid import Row
from experiments.study.recall.cells import Cell
from experiments.study.retrieval.search import Accuracies
from fusedkv_jax import costs


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a model: its layers, width and heads."""

    layers: int
    width: int
    heads: int

    def __str__(self) -> str:
        return f"{self.layers} layers of width {self.width} with {self.heads} heads"


@dataclasses.dataclass(frozen=True)
class Trial:
    """Runs that are compared with each other, on seeds by which nothing was chosen.

    Attributes:
      size: of the models.
      seeds: of their parameters and batches.
      others: what is compared besides the chosen form and `fusedkv`.
    """

    size: Size
    seeds: tuple[int, ...]
    others: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.size}, seeds {', '.join(map(str, self.seeds))}"


DEEPER = Size(8, 64, 2)  # twice the layers of the search's model, nothing else
WIDER = Size(8, 96, 4)
STEPS, LENGTH = 2000, 128
CHOICE = 0  # the seed that chooses between the forms
TRIALS = (
    Trial(DEEPER, (4, 5, 6), ("mha", "svformer", "gqa")),
    Trial(WIDER, (4, 5, 6), ("mha", "svformer", "gqa")),
    # Three seeds left intervals that include zero. Five more, decided before any of them had run.
    Trial(WIDER, (7, 8, 9, 10, 11), ("svformer",)),
)


def svformer_half(num_layers: int) -> str:
    """Layer 1 reads the cache of layer 0; those above have keys of their own and its values."""
    return "_".join(["0", "0", *(f"k{i}v0" for i in range(2, num_layers))])


def half_readers(num_layers: int) -> str:
    """The lower half reads the cache of layer 0; the upper half has keys of its own."""
    middle = num_layers // 2
    return "_".join(["0"] * middle + [f"k{i}v0" for i in range(middle, num_layers)])


# What the best layout of four layers can be for more; with four they are one.
FORMS: Mapping[str, Callable[[int], str]] = {
    "svformer_half": svformer_half,
    "half_readers": half_readers,
}
ROWS: Mapping[str, Row] = {
    **{name: Row(layout=form(DEEPER.layers)) for name, form in FORMS.items()},
    "fusedkv": Row(layout="fusedkv"),
    "svformer": Row(layout="svformer"),
    "mha": Row(layout="mha"),
    "gqa": Row(layout="mha", queries_per_kv_head=2),
}


def cell(name: str, seed: int, size: Size = DEEPER) -> Cell:
    """The run of a layout."""
    row = ROWS[name]
    return Cell(
        layout=row.layout,
        seed=seed,
        seq_len=LENGTH,
        batch_size=4,
        steps=STEPS,
        init_std=size.width**-0.5,  # as the recipe's follows from its width
        queries_per_kv_head=row.queries_per_kv_head,
        num_layers=size.layers,
        d_model=size.width,
        num_heads=size.heads,
    )


def chosen(done: Accuracies) -> str | None:
    """The form of the higher accuracy with the seed that chooses; None before both are done."""
    runs = {name: cell(name, CHOICE) for name in FORMS}
    if any(run not in done for run in runs.values()):
        return None
    return max(runs, key=lambda name: done[runs[name]])


def cells(done: Accuracies) -> Iterator[Cell]:
    """The runs that the finished ones make possible, the most urgent first, done or not."""
    yield from (cell(name, CHOICE) for name in FORMS)
    best = chosen(done)
    if best is None:
        return
    for trial in TRIALS:
        for names in ((best, "fusedkv"), trial.others):
            yield from (cell(name, seed, trial.size) for seed in trial.seeds for name in names)
    for trial in TRIALS[:-1]:
        rest = [name for name in FORMS if name != best]
        yield from (cell(name, seed, trial.size) for seed in trial.seeds for name in rest)


def cache_share(name: str) -> float:
    """Cached elements over those of `mha` with as many layers."""
    ours, whole = (
        costs.cache_bytes(cell(row, CHOICE).config().model, 1, LENGTH) for row in (name, "mha")
    )
    return ours / whole
