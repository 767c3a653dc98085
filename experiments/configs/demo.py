"""A byte-level model of a million parameters that learns Python on two CPU cores.

Paper:     none; a small FusedKV model (arXiv 2512.03870) that shows every part working.
Data:      the .py files of the running Python's standard library; nothing is downloaded.
Hardware:  two CPU cores (AMD EPYC); about two minutes for each layout.
Number:    1.99 bits per byte on held-out text, fusedkv and mha alike (one seed).
Command:   python -m experiments.demo --workdir=DIR  trains and compares fusedkv and mha;
           python -m experiments.train --config=demo --workdir=DIR  trains one,
           with --config.model.layout=mha, fusedkv_lite, yoco ... for another layout.
"""

from fusedkv_jax import presets
from fusedkv_jax.data import DataConfig
from fusedkv_jax.training import ExperimentConfig, OptimizerConfig, TrainConfig

D_MODEL = 128


def get_config() -> ExperimentConfig:
    """The demonstration.

    A budget of minutes favours a model smaller than the preset, small batches, and the initial
    scale 1/sqrt(D): 0.02 belongs to wide models and costs a narrow one most of its budget.
    """
    return ExperimentConfig(
        name="demo",
        model=presets.get(
            "demo",
            layout="fusedkv",
            num_layers=6,
            d_model=D_MODEL,
            num_heads=2,
            d_ff=384,
            init_std=D_MODEL**-0.5,
        ),
        data=DataConfig(source="python_stdlib", seq_len=256, batch_size=2, holdout_fraction=0.05),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=50),
        train=TrainConfig(
            steps=1500, log_every=50, eval_every=500, eval_batches=128, checkpoint_every=500
        ),
    )
