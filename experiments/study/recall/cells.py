"""The runs of the study: the recipe `recall` with some of its settings changed, by question."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from experiments.configs import recall
from fusedkv_jax.training import ExperimentConfig

Framework = Literal["torch", "jax"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run. Its defaults are the recipe's, but for the framework.

    Attributes:
      layout: of the model; both frameworks have it under this name.
      seed: of the initial parameters, and of the training batches.
      framework: whose model is trained, by whose optimizer.
      learning_rate: the peak.
      exit_scale: of the early-exit loss; 0 trains the last layer's output alone.
      seq_len, batch_size, steps, warmup: what is trained on, and for how long.
      qk_norm: queries and keys are normed.
      init_std: of the initial matrices, the embedding among them.
      embedding_scale: multiplies what enters the first layer, and not the output head.
      queries_per_kv_head: query heads that share one head of keys and values.
      num_layers, d_model, num_heads: sizes of the model; its MLP is twice as wide as d_model.
    """

    layout: str
    seed: int
    framework: Framework = "torch"
    learning_rate: float = 1e-2
    exit_scale: float = 1.0
    seq_len: int = 512
    batch_size: int = 4
    steps: int = 4000
    warmup: int = 100
    qk_norm: bool = True
    init_std: float = recall.D_MODEL**-0.5
    embedding_scale: float = 1.0
    queries_per_kv_head: int = 1
    num_layers: int = 4
    d_model: int = recall.D_MODEL
    num_heads: int = 2

    @property
    def name(self) -> str:
        """Unique in the study, and fit for a file's name."""
        layout = self.layout.replace(":", "-")
        parts = [self.framework, layout, f"seed{self.seed}", f"lr{self.learning_rate:.3g}"]
        for name, value in self.changes().items():
            parts.append(f"{name}{value:g}")
        return "-".join(parts)

    def changes(self) -> dict[str, Any]:
        """What differs from the recipe, besides layout, seed, framework and learning rate."""
        named = ("layout", "seed", "framework", "learning_rate")
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in named and getattr(self, field.name) != field.default
        }

    def config(self) -> ExperimentConfig:
        """The experiment, as the library would train it."""
        base = recall.get_config()
        return dataclasses.replace(
            base,
            name=f"recall {self.name}",
            model=base.model.replace(
                layout=self.layout,
                num_layers=self.num_layers,
                d_model=self.d_model,
                num_heads=self.num_heads,
                d_ff=2 * self.d_model,
                qk_norm=self.qk_norm,
                init_std=self.init_std,
                embedding_scale=self.embedding_scale,
                num_kv_heads=self.num_heads // self.queries_per_kv_head,
            ),
            data=dataclasses.replace(
                base.data, seq_len=self.seq_len, batch_size=self.batch_size, seed=self.seed
            ),
            optimizer=dataclasses.replace(
                base.optimizer, learning_rate=self.learning_rate, warmup_steps=self.warmup
            ),
            train=dataclasses.replace(base.train, steps=self.steps, seed=self.seed),
            early_exit=dataclasses.replace(base.early_exit, loss_scale=self.exit_scale),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Cell":
        """The cell that `dataclasses.asdict` described."""
        return cls(**values)
