"""A study is data: sizes, rows and draws; a cell of the grid is one training run."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.common.documents import Document
from fusedkv_jax import costs
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.data import DataConfig
from fusedkv_jax.mesh import MeshConfig
from fusedkv_jax.training import ExperimentConfig, OptimizerConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What one line of a comparison changes in a model.

    Attributes:
      layout: of the model.
      queries_per_kv_head: query heads that share one key/value head.
      head_widening: heads are so many times as wide and as few.
    """

    layout: str
    queries_per_kv_head: int = 1
    head_widening: int = 1

    def apply(self, model: ModelConfig) -> ModelConfig:
        """The model of this row.

        Raises:
          ValueError: the heads cannot be shared or widened so, or the layout does not fit.
        """
        if self.head_widening > 1:
            heads = _divided(model.num_heads, self.head_widening)
            model = model.replace(num_heads=heads, head_dim=model.channels * self.head_widening)
        heads = _divided(model.num_heads, self.queries_per_kv_head)
        return model.replace(layout=self.layout, num_kv_heads=heads)


def _divided(heads: int, by: int) -> int:
    quotient, rest = divmod(heads, by)
    if rest:
        raise ValueError(f"model.num_heads={heads} must be a multiple of {by} for this row")
    return quotient


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """One size of model and how long it trains.

    Attributes:
      model: the reference row's model; its rows change the layout alone.
      batch_size: sequences of a batch.
      learning_rate: where the search for the best one begins.
      logits_mib: as for `TrainConfig`. The order of sums depends on it, so sizes with records keep
        what these were made with.
      more_draws: of some rows, beyond those of the study.
    """

    model: ModelConfig
    batch_size: int
    learning_rate: float
    logits_mib: int | None = 512
    more_draws: Mapping[str, tuple[Seeds, ...]] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Parameters of the reference without its embedding and head."""
        return non_embedding(self.model)


@dataclasses.dataclass(frozen=True, order=True)
class Seeds:
    """What chance decides in a run, equal for the rows that are compared with each other.

    Attributes:
      seed: of the initial parameters.
      order: seed of the order of the training sequences.
    """

    seed: int
    order: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study."""

    size: str
    row: str
    draw: Seeds
    learning_rate: float

    @property
    def name(self) -> str:
        """Unique in its study, and fit for a file's name."""
        chance = f"seed{self.draw.seed}-order{self.draw.order}"
        return f"{self.size}-{self.row}-{chance}-lr{self.learning_rate:.3g}"

    def to_dict(self) -> Document:
        """Plain values for JSON; `from_dict` inverts it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """The cell that `to_dict` described."""
        return cls(**{**values, "draw": Seeds(**values["draw"])})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A grid of runs.

    Attributes:
      name: what --study calls it.
      vocab_size: of the tokenizer that is trained on the study's text.
      seq_len: tokens of a sequence.
      tokens_per_parameter: training tokens for each parameter of the size's reference row,
        embedding and head not counted.
      sizes: by name, in the order in which they are trained.
      rows: by name, in that order too.
      reference: the row whose learning rate is tuned and that the others are compared with.
      equal_cache: the row that the others are compared with besides, for its equal cache.
      checked: the rows at which the tuned learning rate is checked against its neighbors.
      draws: what is repeated; the first is the one that tunes.
      checkpoints: of each run, how many are there when its record is made.
    """

    name: str
    vocab_size: int
    seq_len: int
    tokens_per_parameter: int
    sizes: Mapping[str, Size]
    rows: Mapping[str, Row]
    reference: str
    equal_cache: str
    checked: tuple[str, ...]
    draws: tuple[Seeds, ...]
    checkpoints: int = 1

    def model(self, size: str, row: str) -> ModelConfig:
        """The model of a row at a size."""
        return self.rows[row].apply(self.sizes[size].model)

    def draws_of(self, size: str, row: str) -> tuple[Seeds, ...]:
        """What a row is repeated with at a size."""
        return self.draws + tuple(self.sizes[size].more_draws.get(row, ()))

    def steps(self, size: str) -> int:
        """Training steps of every run of a size."""
        chosen = self.sizes[size]
        tokens = chosen.parameters * self.tokens_per_parameter
        return -(-tokens // (chosen.batch_size * self.seq_len))

    def tokens(self, size: str) -> int:
        """Training tokens of every run of a size."""
        return self.steps(size) * self.sizes[size].batch_size * self.seq_len

    def config(self, cell: Cell, source: pathlib.Path) -> ExperimentConfig:
        """The experiment of a cell on the tokens (and the tokenizer.json) in a folder."""
        size, steps = self.sizes[cell.size], self.steps(cell.size)
        return ExperimentConfig(
            name=f"{self.name} {cell.name}",
            model=self.model(cell.size, cell.row),
            data=DataConfig(
                source=str(source / "tokens"),
                tokenizer=str(source / "tokenizer.json"),
                seq_len=self.seq_len,
                batch_size=size.batch_size,
                seed=cell.draw.order,
            ),
            optimizer=OptimizerConfig(
                learning_rate=cell.learning_rate, warmup_steps=max(steps // 10, 1)
            ),
            train=TrainConfig(
                steps=steps,
                seed=cell.draw.seed,
                logits_mib=size.logits_mib,
                log_every=max(steps // 20, 1),
                eval_batches=1_000_000,  # all of the held-out text
                checkpoint_every=max(steps // 10, 1),
                keep_checkpoints=self.checkpoints,
            ),
            mesh=MeshConfig(devices=1),  # a worker a device
        )


def non_embedding(model: ModelConfig) -> int:
    """Parameters without the embedding and the output head."""
    parts = costs.parameter_breakdown(model)
    return sum(parts.values()) - parts["embedding"] - parts["head"]
