"""StreamingLLM: the first tokens and a window of the last, at positions counted in the cache."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache import KVCache, Store
from fusedkv_jax.cache.calls import Call, MaskArguments, Piece, Rotation, Rows, View
from fusedkv_jax.cache.storage import Slot, Storage, encode, select, write
from fusedkv_jax.cache.stores import RingStore, storage_of
from fusedkv_jax.compression.compressor import CompressionError, Compressor, check_count
from fusedkv_jax.config import ModelConfig, RopeConfig
from fusedkv_jax.layouts import Kind
from fusedkv_jax.model.rotary import extra_rotation


@dataclass(frozen=True)
class StreamingLLM(Compressor):
    """Every token attends to the first `sinks` and the last tokens, `budget` together.

    Attention sinks of arXiv 2309.17453, for prompts and outputs of any length: the cache never
    holds more. Windowed streams stay as they are.

    Attributes:
        budget: tokens that are kept, the sinks included.
        sinks: first tokens, which are always kept.
        reindex: distances are counted in the cache, as if the tokens between had not been;
            otherwise in the text.

    Raises:
        CompressionError: a field is out of range, or no window is left.
    """

    budget: int = 1024
    sinks: int = 4
    reindex: bool = True

    title: ClassVar[str] = "StreamingLLM"
    latent: ClassVar[bool] = True
    cyclic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count(self, "budget")
        check_count(self, "sinks", least=0)
        if self.budget <= self.sinks:
            raise CompressionError(
                f"{self.title}: budget={self.budget} leaves no window beside sinks={self.sinks};"
                " raise budget or lower sinks"
            )

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        if self.reindex and config.rope_kinds != (config.rope,):
            raise CompressionError(
                f"{self.title}: the model's layers differ in their rotary embedding, and one"
                " rotation cannot move all their queries; use reindex=False"
            )

    def begin(self, config: ModelConfig, cache: KVCache) -> tuple[KVCache, None]:
        cache, _ = super().begin(config, cache)
        capacity = cache.capacity
        if capacity is None or self.budget >= capacity:
            return cache, None
        stores = tuple(
            store if group.window is not None else self._store(config, store)
            for group, store in zip(cache.plan.groups, cache.stores, strict=True)
        )
        return KVCache(stores, cache.lengths, cache.plan), None

    def _store(self, config: ModelConfig, store: Store) -> RingStore:
        def empty(length: int) -> tuple[Storage, Storage]:
            def zeros(array: Array) -> Array:
                return jnp.zeros((*array.shape[:2], length, *array.shape[3:]), array.dtype)

            return (
                jax.tree.map(zeros, storage_of(store, "key")),
                jax.tree.map(zeros, storage_of(store, "value")),
            )

        keys, values = empty(self.budget - self.sinks)
        if not self.sinks:
            return RingStore(keys, values)
        first = empty(self.sinks)
        channels = config.geometry.rotary
        return SinkStore(keys, values, *first, config.rope, channels, self.reindex)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "sink_keys", "sink_values"],
    meta_fields=["rope", "channels", "reindex"],
)
@dataclass(frozen=True)
class SinkStore(RingStore):
    """A ring of the last W tokens, and the first s tokens beside it.

    A query at position p sees the sinks 0..s-1 and positions p-W+1..p. Counted in the cache the
    sinks are p + 1 - s - W positions nearer, once tokens are missing: the query is rotated back by
    so many positions before it reads them, which rotation makes the same as moving the keys (and
    fusion weights, equal within each rotary pair, do not change).

    Attributes:
        keys: ring [P, B, W, K, H].
        values: ring [P, B, W, K, H'].
        sink_keys: [P, B, s, K, H].
        sink_values: [P, B, s, K, H'].
        rope: the model's rotary embedding.
        channels: of a key that rotate.
        reindex: count positions in the cache.
    """

    sink_keys: Storage
    sink_values: Storage
    rope: RopeConfig
    channels: int
    reindex: bool

    @property
    def sinks(self) -> int:
        return self.sink_keys.shape[2]

    def write(self, kind: Kind, slot: Slot, new: Float[Array, "B T K H"], call: Call) -> Store:
        sinks = storage_of(self, kind, "sink_")
        sinks = write(sinks, slot, encode(new, sinks), call.first, call.count)  # later ones drop
        return super().write(kind, slot, new, call)._with(kind, sinks, "sink_")

    def view(
        self, kind: Kind, slot: Slot, new: Float[Array, "B T K H"] | None, call: Call
    ) -> tuple[Storage, ...]:
        sinks = select(storage_of(self, kind, "sink_"), slot)
        return (*super().view(kind, slot, new, call), sinks)

    def pieces(
        self,
        keys: tuple[View, ...],
        values: tuple[View, ...],
        q: Float[Array, "B t N H"],
        rows: Rows,
        call: Call,
    ) -> tuple[Piece, ...]:
        window = self.keys.shape[2]
        near = rows._replace(window=min(window, rows.window or window))
        ring = tuple(view[:-1] for view in keys), tuple(view[:-1] for view in values)
        recent = [
            piece._replace(mask=self._without_sinks(piece.mask))
            for piece in super().pieces(*ring, q, near, call)
        ]
        held = jnp.minimum(call.first + call.count, self.sinks)
        first = Piece(
            tuple(view[-1] for view in keys),
            tuple(view[-1] for view in values),
            rows.mask() | {"kv_lengths": held},
            self._extra_rotation(rows.positions) if self.reindex else None,
        )
        return (*recent, first)

    def _without_sinks(self, mask: MaskArguments) -> MaskArguments:
        assert "kv_positions" in mask
        held = mask["kv_positions"]
        return mask | {"kv_positions": jnp.where(held < self.sinks, -1, held)}

    def _extra_rotation(self, positions: Int[Array, "B t"]) -> Rotation:
        missing = jnp.maximum(positions + 1 - self.sinks - self.keys.shape[2], 0)
        parts = extra_rotation(self.rope, self.channels, -missing.reshape(-1))
        cos, sin = (part.reshape(*positions.shape, -1) for part in parts)
        return cos, sin
