"""The small models of the tests: every layout with every head geometry it can have."""

import jax
import pytest
from flax import nnx

import fusedkv_jax as fkv

VOCAB = 61

# Options that make a layout's particular parts show at this size: more passes than tokens, so that
# a cyclic layout is exact; windows shorter than the sequence.
SPECS = {
    "mha": "mha",
    "cla": "cla:k=2",
    "mlkv": "mlkv:m=3",
    "yoco": "yoco",
    "lckv": "lckv:forward_passes=14",
    "dense_fusion": "dense_fusion",
    "fusedkv": "fusedkv",
    "fusedkv_lite": "fusedkv_lite",
    "lite_learnable": "lite_learnable:init=normal",
    "lite_reversed": "lite_reversed",
    "yoco_pp": "yoco_pp",
    "svformer": "svformer",
    "svformer_half": "svformer_half",
    "resformer": "resformer",
    "window_hybrid": "window_hybrid:window=5,full_every=2",
}
# The layouts that differ in kind: sharing, passes, fusion, windows. What is tried through
# `generate` on every layout is quick on these, slow on the others.
FOREMOST = ("cla", "lckv", "fusedkv", "window_hybrid")
# Models of another geometry than GQA that are quick.
QUICK = {("fusedkv", "mha"), ("fusedkv", "mla"), ("mha", "mla")}
# Further shapes of the algebra, in the grammar or with options.
EXTRA_SPECS = {
    "yoco_windowed": "yoco:window=4",
    "yoco_own_norm": "yoco:own_norm=true",
    "fusedkv_iterative": "fusedkv:parameterization=iterative",
    "fusedkv_three_sources": "fusedkv:key_sources=0+1+3,value_sources=0+3,split=4",
    "lckv_middle": "lckv:target=middle,forward_passes=14",
    "lckv_windowed": "0_5s4x4_5s4_6_7:passes=14+1",
    "hybrid_window_only": "window_hybrid:window=4,full_every=2,rebuild=window",
    "serves_others": "0_2_1_3_2_2_k3v1x2:passes=14+1",
}

MLA = fkv.MLAConfig(kv_lora_rank=12, nope_dim=8, rope_dim=4, v_dim=6, q_lora_rank=10)
GEOMETRIES = {"mha": {}, "gqa": {"num_kv_heads": 2}, "mla": {"mla": MLA}}


def config(spec: str, geometry: str = "gqa", **changes) -> fkv.ModelConfig:
    fields = dict(
        vocab_size=VOCAB,
        num_layers=8,
        d_model=24,
        num_heads=4,
        head_dim=8,
        d_ff=32,
        max_length=64,
        init_std=0.2,
        layout=spec,
        **GEOMETRIES[geometry],
    )
    return fkv.ModelConfig(**{**fields, **changes})


def marks(name: str) -> list[pytest.MarkDecorator]:
    """The marks of a layout's case in a test of all layouts."""
    return [] if name in FOREMOST else [pytest.mark.slow]


def cases() -> list:
    """(spec, geometry) of every registered layout and geometry that make sense together."""
    found = []
    for name, spec in {**SPECS, **EXTRA_SPECS}.items():
        for geometry in GEOMETRIES if name in SPECS else ["gqa"]:
            try:
                config(spec, geometry)
            except ValueError as error:
                assert geometry == "mla" and "latent" in str(error)
            else:
                quick = name in SPECS and geometry == "gqa" or (name, geometry) in QUICK
                chosen = [] if quick else [pytest.mark.slow]
                found.append(pytest.param(spec, geometry, id=f"{name}-{geometry}", marks=chosen))
    return found


def tokens(batch: int, length: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCAB)


def decoder(config: fkv.ModelConfig, seed: int = 0) -> fkv.Decoder:
    return fkv.Decoder(config, rngs=nnx.Rngs(seed))
