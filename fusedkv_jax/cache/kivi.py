"""Four bits as KIVI stores them: old tokens quantized, recent ones exact (arXiv 2402.02750).

Keys share a scale per channel and 32 tokens, values per token and 32 channels. Which tokens are
quantized for a query depends on its position alone, so a prompt in chunks equals one in one piece.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache.calls import Call, MaskArguments, Piece, Rows, View
from fusedkv_jax.cache.storage import Slot, Storage, ring_positions, select, write, write_ring
from fusedkv_jax.cache.stores import Store, storage_of
from fusedkv_jax.layouts import Kind
from fusedkv_jax.trees import Leaf
from pallas_kernels.quantized import Quantized, quantize

GROUP = 32  # tokens that are quantized together, and channels of a value that share a scale
RECENT = 128  # tokens that stay exact
PLACES = RECENT + GROUP  # of the exact ring: one group more, which fills up until it is quantized
SCALE_TYPE = jnp.float16
LEAST_CHANNELS = 8


@overload
def quantized_tokens(seen: int) -> int: ...
@overload
def quantized_tokens(seen: Array) -> Array: ...
def quantized_tokens(seen: int | Array) -> int | Array:
    """How many of a row's tokens are in 4 bits once it has seen so many; numbers or arrays."""
    groups = (seen - RECENT) // GROUP
    return GROUP * (max(groups, 0) if isinstance(seen, int) else jnp.maximum(groups, 0))


def channel_group(kind: Kind, channels: int) -> int:
    """Channels of a token that share a scale: 1 for keys; for values up to 32, dividing H.

    Raises:
        ValueError: too few channels would share one, or H is odd.
    """
    if channels % 2:
        raise ValueError(
            f"dtype='int4' packs two channels in a byte, but {kind}s have {channels} channels;"
            " use int8"
        )
    if kind == "key":
        return 1
    group = math.gcd(channels, GROUP)
    if group < LEAST_CHANNELS:
        raise ValueError(
            f"dtype='int4' needs values whose channels, here {channels}, divide by"
            f" {LEAST_CHANNELS}; use int8"
        )
    return group


def empty_codes(kind: Kind, shape: tuple[int, ...]) -> Quantized:
    """Codes of no tokens yet, for a storage [P, B, S, K, H] with S a multiple of 32."""
    *batch, length, heads, channels = shape
    group = channel_group(kind, channels)
    tokens = length // GROUP if kind == "key" else length
    scales = jnp.zeros((*batch, tokens, heads, channels // group), SCALE_TYPE)
    data = jnp.zeros((*batch, length, heads, channels // 2), jnp.uint8)
    return Quantized(data, scales, jnp.zeros_like(scales))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "recent_keys", "recent_values"],
    meta_fields=[],
)
@dataclass(frozen=True)
class KiviStore(Store):
    """Tokens 0 to Q - 1 in 4 bits, the later ones exact; Q = `quantized_tokens(tokens seen)`.

    The query at position t reads the Q of t tokens seen: whatever of its own chunk is older than
    that it reads in 4 bits, as if the tokens had come one by one.

    Attributes:
        keys: codes [P, B, S, K, H].
        values: codes [P, B, S, K, H'].
        recent_keys: exact ring [P, B, 160, K, H]; position p sits in place p mod 160.
        recent_values: exact ring [P, B, 160, K, H'].
    """

    keys: Storage
    values: Storage
    recent_keys: Leaf
    recent_values: Leaf

    rewinds: ClassVar[bool] = True

    def writes_at_end(self, call: Call) -> bool:
        return call.length > 1

    def write(self, kind: Kind, slot: Slot, new: Float[Array, "B T K H"], call: Call) -> KiviStore:
        store, ring = self, storage_of(self, kind, "recent_")
        if not self.writes_at_end(call):
            ring = write(ring, slot, new.astype(ring.dtype), call.first % PLACES, call.count)
            store = store._with(kind, ring, "recent_")
        begin = quantized_tokens(call.first)
        due = quantized_tokens(call.first + call.count) - begin
        tokens = functools.partial(self._due, kind, slot, ring, new, begin, call)
        if call.length == 1:  # one step in 32 fills a group
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(tokens))
            codes = jax.lax.cond(jnp.any(due > 0), tokens, lambda: nothing)
        else:
            codes = tokens()
        return store._with(kind, write(storage_of(self, kind), slot, codes, begin, due))

    def _due(
        self,
        kind: Kind,
        slot: Slot,
        ring: Float[Array, "P B E K H"],
        new: Float[Array, "B T K H"],
        begin: Int[Array, "B"],
        call: Call,
    ) -> Quantized:
        """The groups from position `begin` on in 4 bits, as many as this call can fill."""
        count = GROUP * -(-call.length // GROUP)
        position = begin[:, None] + jnp.arange(count)  # [B, count]
        exact = select(ring, slot)
        place = position % PLACES
        if self.writes_at_end(call):
            exact = jnp.concatenate([exact, new.astype(exact.dtype)], axis=1)
            late = jnp.clip(position - call.first[:, None], 0, call.length - 1)
            place = jnp.where(position < call.first[:, None], place, PLACES + late)
        tokens = jnp.take_along_axis(exact, place[:, :, None, None], axis=1)
        groups = (GROUP, 1) if kind == "key" else (1, channel_group(kind, tokens.shape[-1]))
        return quantize(tokens, "int4", *groups, scale_dtype=SCALE_TYPE)

    def view(
        self, kind: Kind, slot: Slot, new: Array | None, call: Call
    ) -> tuple[Quantized, Array]:
        codes = select(storage_of(self, kind), slot)
        exact = select(storage_of(self, kind, "recent_"), slot)
        if new is not None:
            exact = jnp.concatenate([exact, new.astype(exact.dtype)], axis=1)
        return codes, exact

    def pieces(
        self,
        keys: tuple[View, ...],
        values: tuple[View, ...],
        q: Float[Array, "B t N H"],
        rows: Rows,
        call: Call,
    ) -> tuple[Piece, ...]:
        old, exact = (
            (tuple(view[i] for view in keys), tuple(view[i] for view in values)) for i in (0, 1)
        )
        quantized = quantized_tokens(rows.positions)
        coded: MaskArguments = {
            "causal": True,
            "q_positions": quantized - 1,
            "kv_lengths": quantized_tokens(call.first + call.count),
        }
        held = self._exact_positions(call)
        if not self.writes_at_end(call):
            return Piece(*old, coded), Piece(*exact, rows.mask() | {"kv_positions": held})
        # A query's exact tokens begin where its codes end: the last R/32 whole groups before its
        # own group, and its own group up to itself.
        block, groups = rows.positions // GROUP, held // GROUP
        before: MaskArguments = {
            "causal": True,
            "window": RECENT // GROUP,
            "q_positions": block - 1,
            "kv_positions": groups,
        }
        within: MaskArguments = {
            "q_segment_ids": block,
            "kv_segment_ids": groups,
            "kv_positions": held,
        }
        return Piece(*old, coded), Piece(*exact, before), Piece(*exact, rows.mask() | within)

    def _exact_positions(self, call: Call) -> Int[Array, "B E"]:
        """Position of every exact token, negative for what is in 4 bits or not there."""
        seen = call.first if self.writes_at_end(call) else call.first + call.count
        held = ring_positions(seen, PLACES)
        held = jnp.where(held >= quantized_tokens(call.first)[:, None], held, -1)
        if not self.writes_at_end(call):
            return held
        return jnp.concatenate([held, call.valid_positions], axis=1)

    def finish(self, new: dict[Kind, Float[Array, "P B T K H"]], call: Call) -> KiviStore:
        store = self
        for kind, streams in new.items():
            ring = storage_of(self, kind, "recent_")
            update = jax.vmap(write_ring, in_axes=(0, 0, None, None))
            ring = update(ring, streams, call.first, call.count)
            store = store._with(kind, ring, "recent_")
        return store

    @property
    def capacity(self) -> int:
        """Tokens that a row can be given: the most of which no more than S are quantized."""
        return self.keys.shape[2] + PLACES - 1
