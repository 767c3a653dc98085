"""The model: Flax NNX modules that follow a layout."""

from fusedkv_jax.model.decoder import Decoder
from fusedkv_jax.model.fold import fold_fusion
from fusedkv_jax.model.parameters import FusionWeight, NoDecayParam, weight_decay_mask

__all__ = ["Decoder", "FusionWeight", "NoDecayParam", "fold_fusion", "weight_decay_mask"]
