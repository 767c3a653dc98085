"""One decoder layer: attention over whichever streams its layout names, then the feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from fusedkv_jax.layouts import Kind, LayerKV
from fusedkv_jax.model.attention import Attention, Sources, StreamWeights
from fusedkv_jax.model.latent import LatentAttention
from fusedkv_jax.model.layers import RMSNorm, SwiGLU
from fusedkv_jax.model.parameters import Initializer
from fusedkv_jax.model.rotary import Rotation

# Given a layer's new streams, the sources that its attention reads, keys and values.
Reader = Callable[[dict[Kind, Array]], tuple[Sources, Sources]]


class Block(nnx.Module):
    """Pre-norm layer with residual connections."""

    def __init__(self, init: Initializer, layer: LayerKV):
        width = init.config.d_model
        attention = Attention if init.config.mla is None else LatentAttention
        self.attention_norm = RMSNorm(init, width)
        self.kv_norm = RMSNorm(init, width) if layer.kv_norm else None
        self.attention = attention(init, layer)
        self.mlp_norm = RMSNorm(init, width)
        self.mlp = SwiGLU(init)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        read: Reader,
        weights: dict[Kind, StreamWeights],
        mask: dict[str, Any],
    ) -> Float[Array, "B T D"]:
        """Run the layer.

        Args:
            x: hidden states.
            rotation: cosines and sines of the tokens' positions.
            read: takes the layer's new streams and gives the key and value sources to attend to.
            weights: fusion weights of the sources; None where one source is reused.
            mask: masking arguments of the attention operation.
        """
        normed = self.attention_norm(x)
        q = self.attention.queries(normed, rotation)
        own = normed if self.kv_norm is None else self.kv_norm(x)
        keys, values = read(self.attention.own_streams(own, rotation))
        x = x + self.attention.attend(q, keys, values, weights["key"], weights["value"], mask)
        return x + self.mlp(self.mlp_norm(x))
