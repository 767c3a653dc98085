"""The layouts that are searched, for four layers, and what each costs in cache."""

from collections.abc import Mapping

from experiments.configs import recall
from experiments.study.grid import Row
from fusedkv_jax import costs

BUDGET = 0.55  # of the cache of `mha`, counted at LENGTH tokens
LENGTH = 128

# What the others are compared with, whatever it costs. The second has the most accurate record of
# --study=recall. The third came last, when runs with eight layers had been seen: its share falls
# with depth, to 55 % with ten layers.
REFERENCES: Mapping[str, Row] = {
    "mha": Row(layout="mha"),
    "mha_values0": Row(layout="0_1_k2v0_k3v0"),
    "svformer": Row(layout="svformer"),
}

CANDIDATES: Mapping[str, Row] = {
    # Published.
    "fusedkv": Row(layout="fusedkv"),
    "fusedkv_lite": Row(layout="fusedkv_lite"),
    "lite_reversed": Row(layout="lite_reversed"),
    "yoco": Row(layout="yoco"),
    "cla": Row(layout="cla"),  # mlkv with half of the layers is the same
    "gqa": Row(layout="mha", queries_per_kv_head=2),
    # fusedkv with one stream of a single source.
    "fused_keys": Row(layout="fusedkv:value_sources=0"),
    "fused_values": Row(layout="fusedkv:key_sources=1"),
    # fusedkv with a weight for each head instead of each channel; came after all others had run.
    "fused_heads": Row(layout="fusedkv:granularity=head"),
    # The values of layer 0 alone, so that three layers can have keys of their own.
    "values0_keys012": Row(layout="0_k1v0_k2v0_k2v0"),
    "values0_keys013": Row(layout="0_k1v0_k1v0_k3v0"),
    "values0_keys023": Row(layout="0_0_k2v0_k3v0"),
    "values0_keys01": Row(layout="0_k1v0_k1v0_k1v0"),
    # Two values; the keys of an upper layer are its own.
    "keys02_values01": Row(layout="0_k0v1_k2v0_k2v0"),
    # A layer with a narrow window costs an eighth, and pays for one upper layer or more.
    "window_keys23": Row(layout="0_1s16_k2v0_k3v0"),
    "window_keys2": Row(layout="0_1s16_k2v0_k2v0"),
    "window_fused2": Row(layout="0_1s16_2_f0+2"),
    "windows_below": Row(layout="0s8_1s8_2_3"),
}

ROWS: Mapping[str, Row] = {**REFERENCES, **CANDIDATES}


def cache_share(row: Row, length: int = LENGTH) -> float:
    """Cached elements over those of `mha` after so many tokens; a window keeps its width."""
    model = recall.get_config().model.replace(layout="mha")
    return costs.cache_bytes(row.apply(model), 1, length) / costs.cache_bytes(model, 1, length)
