"""The paper's claim at a small size: half the cache, and a loss no higher than the standard one.

Paper:     arXiv 2512.03870 compares these layouts from 332M parameters and 200B tokens upwards;
           this is the same comparison with a byte-level model of about a million parameters,
           so it says something about the code and little about the claim.
Data:      the .py files of the running Python's standard library, as in the demo.
Hardware:  two CPU cores; about 25 minutes for all rows with three seeds.
Number:    in experiments/results/claim_small.md, with the machine and the command.
Command:   python -m experiments.reproduce
           and python -m experiments.train --config=claim_small --workdir=DIR for a single run.
"""

import dataclasses

from experiments.configs import demo
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.training import ExperimentConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the comparison.

    Attributes:
      layout: of the model.
      queries_per_kv_head: query heads that share one key/value head.
    """

    layout: str
    queries_per_kv_head: int = 1

    def apply(self, model: ModelConfig) -> ModelConfig:
        """The model of this row.

        Raises:
          ValueError: the heads cannot be shared so, or the layout does not fit.
        """
        heads, rest = divmod(model.num_heads, self.queries_per_kv_head)
        if rest:
            raise ValueError(
                f"model.num_heads={model.num_heads} must be a multiple of "
                f"{self.queries_per_kv_head} for this row"
            )
        return model.replace(layout=self.layout, num_kv_heads=heads)


# All but the first have half the cache of the first.
ROWS = {
    "mha": Row(layout="mha"),
    "gqa": Row(layout="mha", queries_per_kv_head=2),
    "yoco": Row(layout="yoco"),
    "cla": Row(layout="cla:k=2"),
    "fusedkv_lite": Row(layout="fusedkv_lite"),
    "fusedkv": Row(layout="fusedkv"),
}


def get_config() -> ExperimentConfig:
    """What all rows have in common; the layout and the seed are those of the row."""
    config = demo.get_config()
    # Four heads, so that the gqa row still has more than one.
    model = config.model.replace(num_heads=4)
    train = dataclasses.replace(
        config.train, steps=600, log_every=100, eval_every=0, eval_batches=250, checkpoint_every=0
    )
    return dataclasses.replace(config, name="claim_small", model=model, train=train)
