"""Stores: what becomes of the tokens of one group of streams, and what attention reads of them."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import jax
from jaxtyping import Array, Bool, Float, Int

from fusedkv_jax.cache.calls import Call, Piece, Reading, Rows, View
from fusedkv_jax.cache.storage import (
    Slot,
    Storage,
    encode,
    ring_positions,
    select,
    source_in_place,
    write,
    write_ring,
)
from fusedkv_jax.layouts import Kind
from fusedkv_jax.trees import Leaf
from pallas_kernels import choice

# Tokens of a call up to which streams are read in place: more transpose a stream anyway.
IN_PLACE_TOKENS = 16
_ENDLESS = (1 << 30) - 1  # more tokens than any row is given; see `KVCache.overflowed`


S = TypeVar("S")


class Store:
    """The tokens of one group of streams; subclasses are frozen pytree dataclasses.

    A call writes every stream, layer by layer; layers read sources as views, which are made once
    for all layers that read them, and turned into pieces by each layer's queries.

    What a subclass does not say otherwise is that of tokens in order: the one at position p sits in
    place p of `keys` and `values`, storages [P, B, S, K, H].
    """

    watches: ClassVar[bool] = False  # `watch` wants to see what layers read
    transient: ClassVar[bool] = False  # nothing outlives the call, so that gradients can flow
    # What a rejected draft leaves behind is never read or can be undone, and its tokens read
    # together what they would one by one.
    rewinds: ClassVar[bool] = False

    def writes_at_end(self, call: Call) -> bool:
        """New tokens come to `finish`, and to `view` until then."""
        return False

    def place(self, position: Int[Array, "..."]) -> Int[Array, "..."]:
        """Where a token is put."""
        return position

    def write(self, kind: Kind, slot: Slot, new: Float[Array, "B T K H"], call: Call) -> Store:
        """The store with one layer's new stream; writing it again changes nothing."""
        if self.writes_at_end(call):
            return self
        storage = storage_of(self, kind)
        start = self.place(call.first)
        return self._with(kind, write(storage, slot, encode(new, storage), start, call.count))

    def view(self, kind: Kind, slot: Slot, new: Float[Array, "B T K H"] | None, call: Call) -> View:
        """One source as `pieces` takes it.

        Args:
            kind: keys or values.
            slot: the stream.
            new: its new tokens where they are written at the end of the call, else None.
            call: the tokens of this call.
        """
        return select(storage_of(self, kind), slot)

    def shared(self, view: View) -> View:
        """A view that several layers will read."""
        return view

    def pieces(
        self,
        keys: tuple[View, ...],
        values: tuple[View, ...],
        q: Float[Array, "B t N H"],
        rows: Rows,
        call: Call,
    ) -> tuple[Piece, ...]:
        """What a layer's queries attend to, given the views of its sources."""
        mask = rows._replace(positions=self.place(rows.positions)).mask()
        return (Piece(keys, values, mask | {"kv_lengths": self.place(call.first + call.count)}),)

    def watch(self, reading: Reading, call: Call) -> Store:
        """The store after a layer has read it; called if `watches`."""
        return self

    def finish(self, new: dict[Kind, Float[Array, "P B T K H"]], call: Call) -> Store:
        """The store at the end of the call.

        Args:
            new: where new tokens are written at the end, those of all streams, in the order of
                slots.
            call: the tokens of this call.
        """
        return self

    @property
    def capacity(self) -> int | None:
        """Tokens that a row can be given in all; None for any number."""
        return storage_of(self, "key").shape[2]

    def overflows(self, lengths: Int[Array, "B"]) -> Bool[Array, "B"]:
        """Rows that so many tokens are too many for."""
        return lengths > (_ENDLESS if self.capacity is None else self.capacity)

    def token_shape(self, kind: Kind) -> tuple[int, int]:
        """Heads and channels of a token's stream."""
        return tuple(storage_of(self, kind).shape[-2:])  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def _with(self: S, kind: Kind, storage: Storage, prefix: str = "") -> S:
        return dataclasses.replace(self, **{_field(kind, prefix): storage})  # type: ignore[type-var]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["keys", "values", "dropped"], meta_fields=[]
)
@dataclass(frozen=True)
class LinearStore(Store):
    """Tokens in order: position p sits in place p - dropped.

    Attributes:
        keys: storage [P, B, S, K, H].
        values: storage [P, B, S, K, H'].
        dropped: tokens that a compressor took out of each row, int32 [B]; None for none. The
            tokens that it left sit in the first places in any order, each KV head's own; later
            tokens follow them.
    """

    keys: Storage
    values: Storage
    dropped: Leaf | None = None

    rewinds: ClassVar[bool] = True

    def place(self, position: Int[Array, "..."]) -> Int[Array, "..."]:
        if self.dropped is None:
            return position
        return position - self.dropped.reshape(-1, *(1,) * (position.ndim - 1))

    def view(self, kind: Kind, slot: Slot, new: Float[Array, "B T K H"] | None, call: Call) -> View:
        storage = storage_of(self, kind)
        if call.length <= IN_PLACE_TOKENS and choice.device()[0] == "cpu":
            return source_in_place(storage, slot)
        return select(storage, slot)

    def pieces(
        self,
        keys: tuple[View, ...],
        values: tuple[View, ...],
        q: Float[Array, "B t N H"],
        rows: Rows,
        call: Call,
    ) -> tuple[Piece, ...]:
        if self.dropped is not None and rows.window is not None:
            raise ValueError(
                f"window={rows.window} cannot be told in a store whose tokens were compressed;"
                " compress streams that are read in full only"
            )
        return super().pieces(keys, values, q, rows, call)

    def overflows(self, lengths: Int[Array, "B"]) -> Bool[Array, "B"]:
        return self.place(lengths) > self.keys.shape[2]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=[])
@dataclass(frozen=True)
class RingStore(Store):
    """The last S tokens: position p sits in place p mod S.

    One new token is written before it is read, as the token that it overwrites has left every
    window. Of several, early ones still need what late ones overwrite: they are read beside the
    ring, and written at the end.

    Attributes:
        keys: storage [P, B, S, K, H].
        values: storage [P, B, S, K, H'].
    """

    keys: Storage
    values: Storage

    rewinds: ClassVar[bool] = True

    def writes_at_end(self, call: Call) -> bool:
        return call.length > 1

    def place(self, position: Int[Array, "..."]) -> Int[Array, "..."]:
        return position % self.keys.shape[2]  # the one token of a call does not wrap around

    def view(
        self, kind: Kind, slot: Slot, new: Float[Array, "B T K H"] | None, call: Call
    ) -> tuple[Storage, ...]:
        storage = storage_of(self, kind)
        old = select(storage, slot)
        return (old,) if new is None else (old, encode(new, storage))

    def pieces(
        self,
        keys: tuple[View, ...],
        values: tuple[View, ...],
        q: Float[Array, "B t N H"],
        rows: Rows,
        call: Call,
    ) -> tuple[Piece, ...]:
        slots = self.keys.shape[2]
        # Positions say where in the past each place of the ring is, and which are still empty. Two
        # pieces instead of one array: putting the new tokens behind the ring would copy all of it.
        if self.writes_at_end(call):
            held = (ring_positions(call.first, slots), call.valid_positions)
        else:
            held = (ring_positions(call.first + call.count, slots),)
        return tuple(
            Piece(
                tuple(view[piece] for view in keys),
                tuple(view[piece] for view in values),
                rows.mask() | {"kv_positions": positions},
            )
            for piece, positions in enumerate(held)
        )

    def finish(self, new: dict[Kind, Float[Array, "P B T K H"]], call: Call) -> RingStore:
        store = self
        for kind, streams in new.items():
            storage = storage_of(self, kind)

            def update(ring: Storage, tokens: Array, storage: Storage = storage) -> Storage:
                return write_ring(ring, encode(tokens, storage), call.first, call.count)

            # All streams at once, after the last layer has read: any of them may read any ring.
            store = store._with(kind, jax.vmap(update)(storage, streams))
        return store

    @property
    def capacity(self) -> int | None:
        return None


def storage_of(store: Store, kind: Kind, prefix: str = "") -> Any:
    """A store's storage of keys or values."""
    return getattr(store, _field(kind, prefix))


def _field(kind: Kind, prefix: str) -> str:
    return prefix + ("keys" if kind == "key" else "values")
