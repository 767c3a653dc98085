"""The model: Flax NNX modules that follow a layout."""

from typing import TYPE_CHECKING

from fusedkv_jax.lazy import lazy_names

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

if TYPE_CHECKING:
    from fusedkv_jax.model.checks import check_room, check_tokens
    from fusedkv_jax.model.decoder import Decoder
    from fusedkv_jax.model.parameters import FusionWeight, NoDecayParam, weight_decay_mask
    from fusedkv_jax.model.runahead import check_parts, extend_in_parts
    from fusedkv_jax.model.transform import fold_fusion, for_decoding, unroll_layers
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        __all__,
        {
            "checks": ["check_room", "check_tokens"],
            "decoder": ["Decoder"],
            "parameters": ["FusionWeight", "NoDecayParam", "weight_decay_mask"],
            "runahead": ["check_parts", "extend_in_parts"],
            "transform": ["fold_fusion", "for_decoding", "unroll_layers"],
        },
    )
