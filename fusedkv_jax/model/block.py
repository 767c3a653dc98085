"""One decoder layer: attention over whichever streams its layout names, then the feed-forward."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Float

from fusedkv_jax.cache import Piece
from fusedkv_jax.layouts import Kind, LayerKV
from fusedkv_jax.model.attention import Attention, StreamWeights
from fusedkv_jax.model.latent import LatentAttention
from fusedkv_jax.model.layers import RMSNorm, SwiGLU
from fusedkv_jax.model.parameters import Initializer
from fusedkv_jax.model.rotary import Rotation
from fusedkv_jax.sharding import constrain

# Given a layer's new streams and its queries, what its attention reads.
Reader = Callable[[dict[Kind, Array], Array], tuple[Piece, ...]]
# Told the queries, what they read, and the log-sum-exp of their scores.
Watcher = Callable[[Array, tuple[Piece, ...], Array], None]


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
        watch: Watcher | None = None,
    ) -> Float[Array, "B T D"]:
        """Run the layer.

        Args:
            x: hidden states.
            rotation: cosines and sines of the tokens' positions.
            read: takes the layer's new streams and queries and gives the pieces to attend to.
            weights: fusion weights of the sources; None where one source is reused.
            watch: called with what was read.
        """
        normed = self.attention_norm(x)
        q = self.attention.queries(normed, rotation)
        own = normed if self.kv_norm is None else self.kv_norm(x)
        pieces = read(self.attention.own_streams(own, rotation), q)
        out, lse = self.attention.attend(
            q, pieces, weights["key"], weights["value"], with_lse=watch is not None
        )
        if watch is not None:
            watch(q, pieces, lse)
        x = constrain(x + out, "batch", "sequence", None)
        return constrain(x + self.mlp(self.mlp_norm(x)), "batch", "sequence", None)
