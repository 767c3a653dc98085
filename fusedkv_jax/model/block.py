"""One decoder layer: attention over whichever streams its layout names, then the feed-forward."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from fusedkv_jax.cache.calls import Piece, StreamWeights
from fusedkv_jax.layouts import Kind, LayerKV
from fusedkv_jax.model.attention import Attention, Lse
from fusedkv_jax.model.latent import LatentAttention
from fusedkv_jax.model.layers import FeedForward, Norm, make_norm
from fusedkv_jax.model.parameters import Initializer
from fusedkv_jax.model.rotary import Rotation
from fusedkv_jax.sharding import constrain


class Block(nnx.Module):
    """Attention and feed-forward with residual connections; `BlockConfig` says how they are joined.

    A branch has a norm before it, after it, or both. In parallel both branches read the layer's
    input; otherwise the feed-forward reads the sum of that and attention. `stack.run_layer` says
    how a layer is run.
    """

    def __init__(self, init: Initializer, layer: LayerKV):
        width = init.config.d_model
        attention = Attention if init.config.mla is None else LatentAttention
        self.config = init.config.block
        self.attention_norm = make_norm(init, width)
        self.kv_norm = make_norm(init, width) if layer.kv_norm else None
        self.attention = attention(init, layer)
        self.mlp_norm = make_norm(init, width)
        self.mlp = FeedForward(init)
        both = self.config.norm_placement == "both"
        self.attention_out_norm = make_norm(init, width) if both else None
        self.mlp_out_norm = make_norm(init, width) if both else None

    def project(
        self, x: Float[Array, "B T D"], rotation: Rotation
    ) -> tuple[Float[Array, "B T N H"], dict[Kind, Array]]:
        """Queries, and the new tokens' streams that the layer owns, [B, T, K, H]."""
        normed = self._before(self.attention_norm, x)
        q = self.attention.queries(normed, rotation)
        own = normed if self.kv_norm is None else self.kv_norm(x)
        return q, self.attention.own_streams(own, rotation)

    def attend(
        self,
        q: Float[Array, "B T N H"],
        pieces: tuple[Piece, ...],
        weights: dict[Kind, StreamWeights],
        with_lse: bool = False,
    ) -> tuple[Float[Array, "B T D"], Lse]:
        """Attention over what the streams gave; see `Attention.attend`."""
        return self.attention.attend(q, pieces, weights, with_lse)

    def finish(self, x: Float[Array, "B T D"], out: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Hidden states with attention's output and the feed-forward's."""
        out = self._after(self.attention_norm, self.attention_out_norm, out)
        if self.config.parallel:
            return constrain(x + out + self._feed_forward(x), "batch", "sequence", None)
        x = constrain(x + out, "batch", "sequence", None)
        return constrain(x + self._feed_forward(x), "batch", "sequence", None)

    def _feed_forward(self, x: Array) -> Array:
        out = self.mlp(self._before(self.mlp_norm, x))
        return self._after(self.mlp_norm, self.mlp_out_norm, out)

    def _before(self, norm: Norm, x: Array) -> Array:
        return x if self.config.norm_placement == "post" else norm(x)

    def _after(self, norm: Norm, out_norm: Norm | None, out: Array) -> Array:
        """What a branch adds to the hidden states."""
        if self.config.norm_placement != "pre":
            out = norm(out) if out_norm is None else out_norm(out)
        scale = self.config.residual_scale
        return out if scale == 1 else out * scale
