"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one latent for keys and values.

The "value" stream is the latent c after its norm, the "key" stream the rotary key that all heads
share. Fusion weights apply to these two, before the layer's own up-projection (`kv_b`).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fusedkv_jax.cache.calls import Piece, Source, StreamWeights
from fusedkv_jax.layouts import Kind, LayerKV
from fusedkv_jax.model.attention import Lse, joined, merged, needs_residuals
from fusedkv_jax.model.layers import RMSNorm
from fusedkv_jax.model.mixing import mix
from fusedkv_jax.model.parameters import Initializer
from fusedkv_jax.model.projection import project
from fusedkv_jax.model.rotary import Rotation, rotate, yarn_temperature
from fusedkv_jax.model.sharded_attention import attention
from pallas_kernels.combining import Part
from pallas_kernels.quantized import Quantized
from pallas_kernels.stacked import read


class LatentAttention(nnx.Module):
    """Queries, the own latent and rotary key, and the output projection of one layer."""

    def __init__(self, init: Initializer, layer: LayerKV):
        config, mla = init.config, init.config.mla
        assert mla is not None
        self.mla = mla
        self.implementation = config.attention
        heads, width = config.num_heads, config.d_model
        self.scale = (mla.nope_dim + mla.rope_dim) ** -0.5
        if config.rope.scaling == "yarn":
            # DeepSeek-V2 moves YaRN's temperature from cos and sin into the scores.
            self.scale *= yarn_temperature(config.rope.factor, config.rope.mscale_all_dim) ** 2
        query_width = mla.q_lora_rank or width
        low_rank = mla.q_lora_rank > 0
        self.q_a_proj = init.matrix(width, mla.q_lora_rank) if low_rank else None
        self.q_a_norm = RMSNorm(init, mla.q_lora_rank) if low_rank else None
        self.q_proj = init.matrix(query_width, heads, mla.nope_dim + mla.rope_dim)
        self.kv_b_proj = init.matrix(mla.kv_lora_rank, heads, mla.nope_dim + mla.v_dim)
        self.o_proj = init.matrix(heads, mla.v_dim, width)
        latent = (width, mla.kv_lora_rank + mla.rope_dim)
        self.kv_a_proj = init.matrix(*latent) if layer.caches else None
        self.kv_a_norm = RMSNorm(init, mla.kv_lora_rank) if layer.caches else None

    def queries(self, x: Float[Array, "B T D"], rotation: Rotation) -> Float[Array, "B T N H"]:
        """Queries [..., nope + rope], the last channels rotated."""
        if self.q_a_proj is not None and self.q_a_norm is not None:
            x = self.q_a_norm(project(x, self.q_a_proj[...]))
        q = project(x, self.q_proj[...])
        q_nope, q_rope = jnp.split(q, [self.mla.nope_dim], axis=-1)
        return checkpoint_name(jnp.concatenate([q_nope, rotate(q_rope, rotation)], axis=-1), "q")

    def own_streams(self, x: Float[Array, "B T D"], rotation: Rotation) -> dict[Kind, Array]:
        """New tokens' rotary key [B, T, 1, rope] and normed latent [B, T, 1, d_c], if owned."""
        if self.kv_a_proj is None or self.kv_a_norm is None:
            return {}
        both = project(x, self.kv_a_proj[...])[:, :, None, :]
        latent, key = jnp.split(both, [self.mla.kv_lora_rank], axis=-1)
        key, latent = rotate(key, rotation), self.kv_a_norm(latent)
        return {"key": checkpoint_name(key, "k"), "value": checkpoint_name(latent, "v")}

    def attend(
        self,
        q: Float[Array, "B T N H"],
        pieces: tuple[Piece, ...],
        weights: dict[Kind, StreamWeights],
        with_lse: bool = False,
    ) -> tuple[Float[Array, "B T D"], Lse]:
        """Attention output, projected back to the model's width, and the scores' log-sum-exp.

        A single query per row, and the few of a row in pages, read the latents as they are (the
        up-projections are absorbed into query and output); many queries share keys and values
        that are expanded once. For the arguments see `Attention.attend`.
        """
        options: dict[str, Any] = {"scale": self.scale, "implementation": self.implementation}
        options["return_residuals"] = needs_residuals(pieces, with_lse)
        found = [self._attend_piece(q, piece, weights, options) for piece in pieces]
        context, lse = (joined if pieces[0].cut else merged)(found, with_lse)
        return project(context.astype(q.dtype), self.o_proj[...], 2), lse

    def _attend_piece(
        self,
        q: Float[Array, "_ _ N R"],
        piece: Piece,
        weights: dict[Kind, StreamWeights],
        options: dict[str, Any],
    ) -> Part | Array:
        """Each head's weighted sum of the values of one piece, [B, T, N, v]."""
        queries = q if piece.extra_rotation is None else self._rotate(q, piece.extra_rotation)
        queries = queries if piece.cut is None else piece.cut.take(queries)
        keys, values = (
            [_plain(x, q.dtype) for x in sources] for sources in (piece.keys, piece.values)
        )
        # The rows of a lane have few queries each, and would expand a whole context for them: it
        # pays from c (nope + v) / (2 c - nope - v) queries on, 170 with DeepSeek's sizes.
        absorbed = queries.shape[1] == 1 or piece.cut is not None
        attend = self._attend_absorbed if absorbed else self._attend_expanded
        return attend(queries, (keys, values), weights, {**piece.mask, **options})

    def _rotate(self, q: Array, rotation: Rotation) -> Array:
        """Rotate the last channels further."""
        still, rotating = jnp.split(q, [q.shape[-1] - self.mla.rope_dim], axis=-1)
        return jnp.concatenate([still, rotate(rotating, rotation)], axis=-1)

    def _attend_expanded(
        self,
        q: Float[Array, "B T N R"],
        sources: tuple[list[Array], list[Array]],
        weights: dict[Kind, StreamWeights],
        options: dict[str, Any],
    ) -> Part | Array:
        (keys, values), (key_weights, value_weights) = sources, (weights["key"], weights["value"])
        rope_key = keys[0] if key_weights is None else mix(key_weights, keys)
        latent = values[0] if value_weights is None else mix(value_weights, values)
        both = project(latent[:, :, 0], self.kv_b_proj[...])
        k_nope, v = jnp.split(both, [self.mla.nope_dim], axis=-1)
        shared = jnp.broadcast_to(rope_key, (*k_nope.shape[:3], self.mla.rope_dim))
        k = jnp.concatenate([k_nope, shared], axis=-1)
        return attention(q, (k,), (v,), **options)

    def _attend_absorbed(
        self,
        q: Float[Array, "B T N R"],
        sources: tuple[list[Array], list[Array]],
        weights: dict[Kind, StreamWeights],
        options: dict[str, Any],
    ) -> Part | Array:
        """Queries and values are latents, [B, T, N, C + R] and [B, S, 1, C]."""
        (keys, values), (key_weights, value_weights) = sources, (weights["key"], weights["value"])
        up = self.kv_b_proj[...].astype(jnp.float32)
        up_key, up_value = jnp.split(up, [self.mla.nope_dim], axis=-1)
        # Two chained products stand for one of the expanded form: the first stays in float32.
        q_nope, q_rope = jnp.split(q, [self.mla.nope_dim], axis=-1)
        q_latent = jnp.einsum("BTNH,CNH->BTNC", q_nope.astype(jnp.float32), up_key)
        q = jnp.concatenate([q_latent, q_rope.astype(jnp.float32)], axis=-1).astype(q.dtype)
        joint = None
        if key_weights is not None and value_weights is not None:
            joint = jnp.concatenate([value_weights, key_weights], axis=-1)
        both = tuple(jnp.concatenate(pair, axis=-1) for pair in zip(values, keys, strict=True))
        found = attention(q, both, tuple(values), joint, value_weights, **options)
        out, lse = found if isinstance(found, tuple) else (found, None)
        out = jnp.einsum("BTNC,CNH->BTNH", out.astype(jnp.float32), up_value)
        return out if lse is None else (out, lse)


def _plain(source: Source, dtype: DTypeLike) -> Array:
    """A source [B, S, 1, C] as numbers: latents are expanded or joined before attention."""
    (source,) = read((source,))
    if isinstance(source, Quantized):
        return source.dequantize(dtype)
    assert isinstance(source, Array)
    return source.astype(dtype)
