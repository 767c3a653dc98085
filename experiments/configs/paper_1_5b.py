"""The 1.5B model of the FusedKV paper; the recipe is that of paper_332m.

Paper:     validation loss after 400B tokens of FineWeb-Edu: standard transformer 2.241,
           FusedKV 2.221, FusedKV-Lite 2.225 (arXiv 2512.03870).
Hardware:  as for paper_332m; not run with this code, so no number of ours is given.
Command:   python -m experiments.train --config=paper_1_5b --workdir=DIR \\
             --config.data.source='SHARDS/*.arrayrecord' --config.data.tokenizer=tokenizer.json
"""

from experiments.configs import paper_332m
from fusedkv_jax.training import ExperimentConfig


def get_config() -> ExperimentConfig:
    """The paper's run of this size."""
    return paper_332m.get_config("1_5b", tokens=400e9)
