"""One decoder layer: attention over whichever streams its layout names, then the feed-forward."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from fusedkv_jax.cache import Piece
from fusedkv_jax.layouts import Kind, LayerKV
from fusedkv_jax.model.attention import Attention
from fusedkv_jax.model.latent import LatentAttention
from fusedkv_jax.model.layers import RMSNorm, SwiGLU
from fusedkv_jax.model.parameters import Initializer
from fusedkv_jax.model.rotary import Rotation
from fusedkv_jax.sharding import constrain


class Block(nnx.Module):
    """Pre-norm layer with residual connections; `stack.run_layer` says how it is run."""

    def __init__(self, init: Initializer, layer: LayerKV):
        width = init.config.d_model
        attention = Attention if init.config.mla is None else LatentAttention
        self.attention_norm = RMSNorm(init, width)
        self.kv_norm = RMSNorm(init, width) if layer.kv_norm else None
        self.attention = attention(init, layer)
        self.mlp_norm = RMSNorm(init, width)
        self.mlp = SwiGLU(init)

    def project(
        self, x: Float[Array, "B T D"], rotation: Rotation
    ) -> tuple[Float[Array, "B T N H"], dict[Kind, Array]]:
        """Queries, and the new tokens' streams that the layer owns, [B, T, K, H]."""
        normed = self.attention_norm(x)
        q = self.attention.queries(normed, rotation)
        own = normed if self.kv_norm is None else self.kv_norm(x)
        return q, self.attention.own_streams(own, rotation)

    def attend(
        self,
        q: Float[Array, "B T N H"],
        pieces: tuple[Piece, ...],
        weights: dict[Kind, Any],
        with_lse: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Attention over what the streams gave; see `Attention.attend`."""
        return self.attention.attend(q, pieces, weights, with_lse)

    def finish(self, x: Float[Array, "B T D"], out: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Hidden states with attention's output and the feed-forward's."""
        x = constrain(x + out, "batch", "sequence", None)
        return constrain(x + self.mlp(self.mlp_norm(x)), "batch", "sequence", None)
