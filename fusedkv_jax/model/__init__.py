"""The model: Flax NNX modules that follow a layout."""

from fusedkv_jax.model.checks import check_room, check_tokens
from fusedkv_jax.model.decoder import Decoder
from fusedkv_jax.model.parameters import FusionWeight, NoDecayParam, weight_decay_mask
from fusedkv_jax.model.runahead import check_parts, extend_in_parts
from fusedkv_jax.model.transform import fold_fusion, for_decoding, unroll_layers

__all__ = [
    "Decoder",
    "FusionWeight",
    "NoDecayParam",
    "check_parts",
    "check_room",
    "check_tokens",
    "extend_in_parts",
    "fold_fusion",
    "for_decoding",
    "unroll_layers",
    "weight_decay_mask",
]
