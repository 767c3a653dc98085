"""A small model that looks things up, on one CPU core: what compressed caches are measured with.

Paper:     none; the tasks are those of RULER (arXiv 2404.06654) and MQAR (arXiv 2312.04927), the
           early-exit loss is that of LayerSkip (arXiv 2404.16710).
Data:      the source "recall": tasks over 258 token ids, written as they are read. Half of it is
           drill, without which nothing but a single needle is learned in this time.
Hardware:  one CPU core (AMD EPYC), about ten minutes for each layout.
Number:    accuracies in experiments/results/longcontext.md. mha hardly learns it: docs/study.md.
Command:   python -m experiments.train --config=recall --workdir=runs/recall_fusedkv
           python -m experiments.train --config=recall --workdir=runs/recall_mha \\
             --config.model.layout=mha
           python -m experiments.evaluate --suite=longcontext \\
             --workdir=runs/recall_fusedkv,runs/recall_mha --output=experiments/results
"""

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.data import DataConfig
from fusedkv_jax.training import ExperimentConfig, OptimizerConfig, TrainConfig
from fusedkv_jax.training.early_exit_config import EarlyExitConfig

D_MODEL = 64


def get_config() -> ExperimentConfig:
    """The recipe; tied embeddings, because an answer is a token that the prompt contains."""
    return ExperimentConfig(
        name="recall",
        model=ModelConfig(
            vocab_size=258,
            num_layers=4,
            d_model=D_MODEL,
            num_heads=2,
            d_ff=2 * D_MODEL,
            layout="fusedkv",
            max_length=1024,
            tie_embeddings=True,
            init_std=D_MODEL**-0.5,
        ),
        data=DataConfig(source="recall", seq_len=512, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=100),
        train=TrainConfig(
            steps=4000, log_every=100, eval_every=500, eval_batches=16, checkpoint_every=500
        ),
        early_exit=EarlyExitConfig(loss_scale=1.0),
    )
