"""The 332M model of the FusedKV paper, with its recipe (arXiv 2512.03870).

Paper:     validation loss after 200B tokens of FineWeb-Edu: standard transformer 2.651,
           FusedKV 2.642, FusedKV-Lite 2.639; WikiText perplexity 22.85, 22.35, 22.78.
Recipe:    AdamW 0.9/0.95, weight decay 0.1, clipping at 1, learning rate 3e-4 with 2,000 steps
           of warm-up and a cosine to 3e-5, 512 sequences of 8192 tokens, std 0.02.
Hardware:  a slice or some nodes; nobody has run it with this code, so no number of ours is given.
           The paper does not state its own hardware or time. By default all devices share
           parameters and batch (fsdp); `python -m experiments.compile_for_tpu --preset=332m
           --topology=v5e:16x16` proposes mesh, remat and accumulation for a TPU slice. With few
           devices raise --config.train.grad_accumulation.
Data:      FineWeb-Edu and a tokenizer with at most 128,000 ids, both prepared by you.
Command:   python -m experiments.train --config=paper_332m --workdir=DIR \\
             --config.data.source='SHARDS/*.arrayrecord' --config.data.tokenizer=tokenizer.json
           and --config.model.layout=mha, fusedkv_lite, yoco, cla:k=2 for the other rows;
           paper_650m, paper_1_5b and paper_4b are the other sizes.
"""

from fusedkv_jax import presets
from fusedkv_jax.data import DataConfig
from fusedkv_jax.mesh import MeshConfig
from fusedkv_jax.training import ExperimentConfig, OptimizerConfig, TrainConfig

BATCH_SIZE = 512
SEQ_LEN = 8192


def get_config(size: str = "332m", tokens: float = 200e9) -> ExperimentConfig:
    """The paper's run of a preset's size over that many tokens."""
    return ExperimentConfig(
        name=f"paper_{size}",
        model=presets.get(size, layout="fusedkv", dtype="bfloat16", remat="full"),
        data=DataConfig(
            source="fineweb_edu/*.arrayrecord",
            tokenizer="tokenizer.json",
            seq_len=SEQ_LEN,
            batch_size=BATCH_SIZE,
        ),
        optimizer=OptimizerConfig(),  # whose defaults are the paper's
        train=TrainConfig(
            steps=round(tokens / (BATCH_SIZE * SEQ_LEN)),
            log_every=10,
            eval_every=1000,
            eval_batches=16,
            checkpoint_every=1000,
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
