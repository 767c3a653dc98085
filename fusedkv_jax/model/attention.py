"""The projections of an attention layer, for separate keys and values (MHA, GQA, MQA).

A layer has projections only for the streams that it owns; `attend` reads whichever streams it is
given, its own or those of other layers, through the one attention operation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fusedkv_jax.cache.calls import Piece, Source, StreamWeights
from fusedkv_jax.layouts import Kind, LayerKV
from fusedkv_jax.model.layers import Norm, add_bias, make_norm
from fusedkv_jax.model.parameters import Initializer
from fusedkv_jax.model.projection import project
from fusedkv_jax.model.rotary import Rotation, rotate
from fusedkv_jax.model.sharded_attention import attention, ragged_attention
from pallas_kernels import PagedStream, RaggedRows
from pallas_kernels.combining import combine

Lse = Float[Array, "B T N"] | None  # of the scores; None where nobody asks for it


class Attention(nnx.Module):
    """Queries, own keys and values, and the output projection of one layer."""

    def __init__(self, init: Initializer, layer: LayerKV):
        config = init.config
        heads, kv_heads, channels = config.num_heads, config.kv_heads, config.channels
        self.implementation = config.attention
        self.softcap = config.block.attention_softcap
        # Attention divides scores by sqrt(H); another scale is a factor of the queries, so that
        # whatever reads queries and keys agrees.
        scale = config.block.attention_scale
        self.query_scale = 1.0 if scale is None else scale * channels**0.5
        self.q_proj = init.matrix(config.d_model, heads, channels)
        self.o_proj = init.matrix(heads, channels, config.d_model)
        over_all = config.block.qk_norm_over == "all"
        normed = config.qk_norm
        self.q_norm = make_norm(init, channels * (heads if over_all else 1)) if normed else None
        kv_shape = (config.d_model, kv_heads, channels)
        self.k_proj = init.matrix(*kv_shape) if layer.key.own else None
        kv_size = channels * (kv_heads if over_all else 1)
        self.k_norm = make_norm(init, kv_size) if layer.key.own and normed else None
        self.v_proj = init.matrix(*kv_shape) if layer.value.own else None
        biased = config.block.qkv_bias
        self.q_bias = init.bias(heads, channels) if biased else None
        self.k_bias = init.bias(kv_heads, channels) if biased and layer.key.own else None
        self.v_bias = init.bias(kv_heads, channels) if biased and layer.value.own else None
        self.o_bias = init.bias(config.d_model) if config.block.output_bias else None

    def queries(self, x: Float[Array, "B T D"], rotation: Rotation) -> Float[Array, "B T N H"]:
        """Normed, rotated queries."""
        q = self._rotated(x, self.q_proj, self.q_bias, self.q_norm, rotation, self.query_scale)
        return checkpoint_name(q, "q")

    def own_streams(self, x: Float[Array, "B T D"], rotation: Rotation) -> dict[Kind, Array]:
        """New tokens' keys (normed, rotated) and values [B, T, K, H], where the layer owns them."""
        streams: dict[Kind, Array] = {}
        if self.k_proj is not None:
            keys = self._rotated(x, self.k_proj, self.k_bias, self.k_norm, rotation)
            streams["key"] = checkpoint_name(keys, "k")
        if self.v_proj is not None:
            values = add_bias(project(x, self.v_proj[...]), self.v_bias)
            streams["value"] = checkpoint_name(values, "v")
        return streams

    def _rotated(
        self,
        x: Float[Array, "B T D"],
        weight: nnx.Param,
        bias: nnx.Param | None,
        norm: Norm | None,
        rotation: Rotation,
        scale: float = 1.0,
    ) -> Float[Array, "B T N H"]:
        heads = add_bias(project(x, weight[...]), bias)
        if norm is not None:  # over each head, or over all of them as one vector
            size = norm.scale[...].shape[-1]
            heads = norm(heads.reshape(*heads.shape[:2], -1, size)).reshape(heads.shape)
        return rotate(heads if scale == 1 else heads * scale, rotation)

    def attend(
        self,
        q: Float[Array, "B T N H"],
        pieces: tuple[Piece, ...],
        weights: dict[Kind, StreamWeights],
        with_lse: bool = False,
    ) -> tuple[Float[Array, "B T D"], Lse]:
        """Attention output, projected back to the model's width, and the scores' log-sum-exp.

        Args:
            q: queries.
            pieces: what they read.
            weights: fusion weights [J, K, H] of the key and of the value sources; None where one
                source is reused.
            with_lse: the lse is wanted; without it one piece is spared the computation, and the
                lse is None.
        """
        context, lse = self.context(q, pieces, weights, with_lse)
        return add_bias(project(context, self.o_proj[...], 2), self.o_bias), lse

    def context(
        self,
        q: Float[Array, "B T N H"],
        pieces: tuple[Piece, ...],
        weights: dict[Kind, StreamWeights],
        with_lse: bool = False,
    ) -> tuple[Float[Array, "B T N H"], Lse]:
        """What `attend` projects: each head's weighted sum of values, and the log-sum-exp."""
        options: dict[str, Any] = {"implementation": self.implementation}
        options["softcap"] = self.softcap
        options["return_residuals"] = needs_residuals(pieces, with_lse)
        if pieces[0].cut is not None:
            return _over_pages(q, pieces, weights, options)
        found = []
        for piece in pieces:
            queries = q if piece.extra_rotation is None else rotate(q, piece.extra_rotation)
            sources = piece.keys, piece.values, weights["key"], weights["value"]
            found.append(attention(queries, *sources, **piece.mask, **options))
        return merged(found, with_lse)


def _over_pages(
    q: Float[Array, "1 N H h"],
    pieces: tuple[Piece, ...],
    weights: dict[Kind, StreamWeights],
    options: dict[str, Any],
) -> tuple[Array, Lse]:
    """Attention of the rows of all lanes, single tokens and chunks, in one call."""
    counts, lengths = (jnp.concatenate(x) for x in zip(*map(_queries_of, pieces), strict=True))
    lanes = tuple((piece.cut.rows, piece.cut.columns) for piece in pieces if piece.cut)
    rows = RaggedRows.in_lanes(lanes, counts, lengths)
    keys, values = (_with_one_table(side) for side in zip(*(x[:2] for x in pieces), strict=True))
    found = ragged_attention(
        q[0], keys, values, rows, weights["key"], weights["value"],
        window=pieces[0].mask.get("window"), **options,
    )  # fmt: skip
    out, lse = found if isinstance(found, tuple) else (found, None)
    return out[None], None if lse is None else lse[None]


def _queries_of(piece: Piece) -> tuple[Array, Array]:
    """How many queries each row of a lane has, and the position after the last of them."""
    positions, lengths = piece.mask.get("q_positions"), piece.mask.get("kv_lengths")
    assert positions is not None and lengths is not None
    # They go up by one from token to token, and those of padding are below them.
    there = positions >= positions[:, :1]
    counts = jnp.where(lengths > 0, there.sum(1, dtype=jnp.int32), 0)
    return counts, jnp.where(lengths > 0, positions[:, 0] + counts, 0)


def _with_one_table(lanes: tuple[tuple[Source, ...], ...]) -> tuple[PagedStream, ...]:
    """The streams of one side, with the pages of the rows of all lanes."""
    first = [x for x in lanes[0] if isinstance(x, PagedStream)]
    tables = [x[0].table for x in lanes if isinstance(x[0], PagedStream)]
    table = tables[0] if len(tables) == 1 else jnp.concatenate(tables)
    return tuple(dataclasses.replace(x, table=table) for x in first)


def needs_residuals(pieces: tuple[Piece, ...], with_lse: bool) -> bool:
    """Each piece must give its lse as well: it is wanted, or there are others to merge with."""
    return with_lse or len(pieces) > 1 and pieces[0].cut is None


def merged(found: list[Any], with_lse: bool) -> tuple[Array, Lse]:
    """What attention gave for each piece, as attention over all of them, and its lse."""
    if len(found) > 1:
        return combine(found)
    return found[0] if with_lse else (found[0], None)


def joined(found: list[Any], with_lse: bool) -> tuple[Array, Lse]:
    """What attention gave for the queries of each lane, [R, T, ...], side by side, [1, N, ...]."""

    def join(parts: tuple[Array, ...]) -> Array:
        return jnp.concatenate([x.reshape(1, -1, *x.shape[2:]) for x in parts], axis=1)

    if not with_lse:
        return join(tuple(found)), None
    out, lse = (join(parts) for parts in zip(*found, strict=True))
    return out, lse
