"""The study "scaling": the ways to share keys and values, at five small sizes.

At each size all rows see equally many tokens, 20 for each parameter of the standard transformer.
Most rows have half of its cache; resformer caches everything and changes what is cached, svformer
caches all keys and one layer's values, and lckv keeps three layers. `mlkv` is missing because with
half of the layers it is `cla` itself.
"""

from experiments.study.grid import Row, Seeds, Size, Study
from fusedkv_jax.config import ModelConfig

VOCAB_SIZE, SEQ_LEN = 4096, 256
# What is asked at the third size, whose draws differ more than they did below it.
ASKED = ("mha", "fusedkv", "fusedkv_lite", "svformer_half", "svformer")


def _model(num_layers: int, d_model: int, d_ff: int) -> ModelConfig:
    """Four heads, so that two can share one; unrolled, which few layers make cheap."""
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=4,
        d_ff=d_ff,
        max_length=SEQ_LEN,
        tie_embeddings=True,
        init_std=d_model**-0.5,  # 0.02 belongs to wide models
        scan_layers=False,
    )


def get_study() -> Study:
    """The grid; sizes are named by the reference's parameters without its embedding."""
    return Study(
        name="scaling",
        vocab_size=VOCAB_SIZE,
        seq_len=SEQ_LEN,
        tokens_per_parameter=20,
        # Rates are where a search begins: at 0.1m and 0.4m what that of the size before ended with.
        sizes={
            "0.05m": Size(model=_model(4, 32, 88), batch_size=8, learning_rate=8e-3),
            "0.1m": Size(model=_model(4, 48, 128), batch_size=8, learning_rate=6.4e-2),
            "0.4m": Size(
                model=_model(6, 80, 176),
                batch_size=16,
                learning_rate=1.6e-2,
                more_draws=dict.fromkeys(ASKED, (Seeds(3, 3), Seeds(4, 4))),
            ),
            "1.2m": Size(
                model=_model(8, 112, 304), batch_size=16, learning_rate=4e-3, logits_mib=None
            ),
            "3.5m": Size(
                model=_model(8, 192, 512), batch_size=32, learning_rate=2e-3, logits_mib=None
            ),
        },
        rows={
            "mha": Row(layout="mha"),
            "fusedkv": Row(layout="fusedkv"),
            "gqa": Row(layout="mha", queries_per_kv_head=2),
            "svformer": Row(layout="svformer"),
            "svformer_half": Row(layout="svformer_half"),
            "fusedkv_lite": Row(layout="fusedkv_lite"),
            "yoco": Row(layout="yoco"),
            "cla": Row(layout="cla:k=2"),
            "mqa": Row(layout="mha", queries_per_kv_head=2, head_widening=2),
            "yoco_pp": Row(layout="yoco_pp"),
            "dense_fusion": Row(layout="dense_fusion"),
            "resformer": Row(layout="resformer"),
            "lckv": Row(layout="lckv"),
        },
        reference="mha",
        equal_cache="gqa",
        checked=("fusedkv",),
        draws=(Seeds(0, 0), Seeds(1, 1), Seeds(2, 2)),
    )
