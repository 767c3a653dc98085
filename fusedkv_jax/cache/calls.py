"""What a call adds to a cache, and what its layers read of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from fusedkv_jax.cache.storage import Slot
from fusedkv_jax.layouts import Kind
from fusedkv_jax.trees import Leaf
from pallas_kernels import PagedStream, Quantized, Stacked

Source = Array | Quantized | Stacked | PagedStream
View = PyTree  # a source as a store's `view` gives it and its `pieces` take it, in any form
StreamWeights = Float[Array, "_ _ _"] | None  # [J, K, H] of J sources; None where one is reused
Rotation = tuple[Float[Array, "B T h"], Float[Array, "B T h"]]  # cosines and sines


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["first", "count", "segment_ids"],
    meta_fields=["length"],
)
@dataclass(frozen=True)
class Call:
    """The tokens that one call adds: row b gets positions first[b], ..., first[b] + count[b] - 1.

    Attributes:
        first: int32 [B]; None for 0 in every row, which is known while tracing.
        count: int32 [B], 0 to `length`.
        length: columns T of the call, padding included.
        segment_ids: int32 [B, T] document of each token where several are packed in a row, which
            only `SequenceStore` serves; None for one document a row.
    """

    first: Any  # an array or None, which only those stores see that do not ask for it
    count: Leaf
    length: int
    segment_ids: Leaf | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows B and columns T of the arrays of new tokens."""
        return self.count.shape[0], self.length

    @property
    def positions(self) -> Int[Array, "B T"]:
        """Positions of the new tokens; padding counts on."""
        steps = jnp.arange(self.length, dtype=jnp.int32)
        if self.first is None:
            return jnp.broadcast_to(steps, (self.count.shape[0], self.length))
        return self.first[:, None] + steps

    @property
    def valid_positions(self) -> Int[Array, "B T"]:
        """Positions of the new tokens, -1 for padding."""
        return jnp.where(jnp.arange(self.length) < self.count[:, None], self.positions, -1)


class MaskArguments(TypedDict, total=False):
    """The masking arguments of `pallas_kernels.attention`; see there."""

    causal: bool
    window: int | None
    q_positions: Int[Array, "B t"]
    kv_positions: Int[Array, "B S"]
    q_segment_ids: Int[Array, "B t"]
    kv_segment_ids: Int[Array, "B S"]
    kv_lengths: Int[Array, "B"]


class Rows(NamedTuple):
    """The queries of one layer and what they may see.

    Attributes:
        positions: int32 [B, t].
        window: positions that a query sees, its own included; None for all.
        strict: a token does not see itself: the layer reads one above it.
    """

    positions: Int[Array, "B t"]
    window: int | None
    strict: bool

    def mask(self) -> MaskArguments:
        """The queries' part of the masking arguments of `pallas_kernels.attention`."""
        # Without the token itself, a window of W positions begins one position before it.
        window = self.window - 1 if self.window and self.strict else self.window
        return {"causal": True, "window": window, "q_positions": self.positions - self.strict}


@dataclass(frozen=True)
class Cut:
    """Queries of one lane among all: the `rows * columns` ones from `start` on."""

    start: int
    rows: int
    columns: int

    def take(self, q: Float[Array, "1 N *rest"]) -> Float[Array, "R T *rest"]:
        part = q[0, self.start : self.start + self.rows * self.columns]
        return part.reshape(self.rows, self.columns, *q.shape[2:])


class Piece(NamedTuple):
    """A set of tokens that a layer reads; a layer's pieces have no token in common.

    Attributes:
        keys: J sources [B, S, K, H], arrays or `Quantized`.
        values: J' sources [B, S, K, H'].
        mask: which of the tokens a query sees.
        extra_rotation: cosines and sines [B, t, h/2] by which queries are rotated further before
            they read this piece; None for not at all.
        cut: which of the queries read it; None for all. Pieces with cuts are read by different
            queries, so they have tokens in common.
    """

    keys: tuple[Source, ...]
    values: tuple[Source, ...]
    mask: MaskArguments
    extra_rotation: Rotation | None = None
    cut: Cut | None = None


class Reading(NamedTuple):
    """What one layer has just read.

    Attributes:
        layer: the layer; where equal layers are scanned, the first of them.
        slots: places of the key and of the value sources in their store.
        weights: fusion weights [J, K, H] of the sources, None where one source is reused.
        q: queries, [B, t, N, H].
        pieces: what they read.
        lse: log-sum-exp of the scores over all pieces, float32 [B, t, N].
        rows: positions of the queries.
        softcap: of the scores, before the lse; None for none.
    """

    layer: int
    slots: dict[Kind, tuple[Slot, ...]]
    weights: dict[Kind, StreamWeights]
    q: Float[Array, "B t N H"]
    pieces: tuple[Piece, ...]
    lse: Float[Array, "B t N"]
    rows: Rows
    softcap: float | None = None
