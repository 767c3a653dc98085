"""The paper's claim at a small size: half the cache, and a loss no higher than the standard one.

Paper:     arXiv 2512.03870 compares these layouts from 332M parameters and 200B tokens upwards;
           this is the same comparison with a byte-level model of about a million parameters,
           so it says something about the code and little about the claim.
Data:      the .py files of the running Python's standard library, as in the demo.
Hardware:  two CPU cores; about 25 minutes for all rows with three seeds.
Number:    in experiments/results/claim_small.md, with the machine and the command.
Command:   python -m experiments.reproduce, which leaves its table in runs/claim_small,
           and python -m experiments.train --config=claim_small --workdir=DIR for a single run.
"""

import dataclasses

from experiments.configs import demo
from experiments.study.grid import Row
from fusedkv_jax.training import ExperimentConfig

# All but the first have half the cache of the first.
ROWS = {
    "mha": Row(layout="mha"),
    "gqa": Row(layout="mha", queries_per_kv_head=2),
    "yoco": Row(layout="yoco"),
    "cla": Row(layout="cla:k=2"),
    "fusedkv_lite": Row(layout="fusedkv_lite"),
    "fusedkv": Row(layout="fusedkv"),
}


def row(name: str) -> Row:
    """The row of a name; any layout (`cla:k=3`, or in the grammar) is one, with heads as in mha."""
    return ROWS.get(name) or Row(layout=name)


def get_config() -> ExperimentConfig:
    """What all rows have in common; the layout and the seed are those of the row."""
    config = demo.get_config()
    # Four heads, so that the gqa row still has more than one.
    model = config.model.replace(num_heads=4)
    train = dataclasses.replace(
        config.train, steps=600, log_every=100, eval_every=0, eval_batches=250, checkpoint_every=0
    )
    return dataclasses.replace(config, name="claim_small", model=model, train=train)
