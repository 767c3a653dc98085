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
from fusedkv_jax.cache.plan import Group
from fusedkv_jax.cache.storage import Slot, Storage, encode, select, write
from fusedkv_jax.cache.stores import RingStore, storage_of
from fusedkv_jax.compression.compressor import (
    CompressionError,
    Compressor,
    check_count,
    check_flags,
)
from fusedkv_jax.compression.token_sets import merged, readers, storages, token_sets
from fusedkv_jax.config import ModelConfig, RopeConfig
from fusedkv_jax.layouts import Kind
from fusedkv_jax.model.rotary import extra_rotation


@dataclass(frozen=True)
class StreamingLLM(Compressor):
    """Every token attends to the first `sinks` and the last tokens, `budget` together.

    Attention sinks of arXiv 2309.17453, for prompts and outputs of any length: the cache never
    holds more. Windowed streams stay as they are. If distances are counted in the cache, layers
    that share streams must share a rotary embedding.

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
        check_flags(self, "reindex")
        if self.budget <= self.sinks:
            raise CompressionError(
                f"{self.title}: budget={self.budget} leaves no window beside sinks={self.sinks};"
                " raise budget or lower sinks"
            )

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        self._parts(config)
        if self.budget - self.sinks > 1:
            return
        for group in token_sets(config.kv_layout):
            for i in readers(config.kv_layout, group):
                layer = config.kv_layout.layers[i]
                if any(j > i for j in layer.key.sources + layer.value.sources):
                    raise CompressionError(
                        f"{self.title}: budget={self.budget} leaves a window of 1 beside"
                        f" sinks={self.sinks}, but in layer {i}, which reads one above, a token"
                        f" does not see itself; use budget={self.sinks + 2} or more"
                    )

    def begin(self, config: ModelConfig, cache: KVCache) -> tuple[KVCache, None]:
        cache, _ = super().begin(config, cache)
        capacity = cache.capacity
        if capacity is None or self.budget >= capacity:
            return cache, None
        parts, channels = self._parts(config), config.geometry.rotary
        groups = [group for group, _ in parts]
        stores = [self._store(storages(cache, group), rope, channels) for group, rope in parts]
        return merged(cache, groups, stores), None

    def _parts(self, config: ModelConfig) -> list[tuple[Group, RopeConfig | None]]:
        """The streams that are read in full, and what moves the queries that read them.

        Raises:
            CompressionError: layers of different rotary embeddings read the same streams.
        """
        layout, parts = config.kv_layout, dict[RopeConfig | None, Group]()
        for group in token_sets(layout):
            rope = None
            if self.reindex and self.sinks:
                found = {config.layer_ropes[i]: i for i in readers(layout, group)}
                if len(found) > 1:
                    one, other, *_ = sorted(found.values())
                    raise CompressionError(
                        f"{self.title}: layers {one} and {other} read the same streams and differ"
                        " in their rotary embedding, and one rotation cannot move the queries of"
                        " both; use reindex=False"
                    )
                (rope,) = found
            held = parts.get(rope, Group(None, (), ()))
            keys, values = sorted(held.keys + group.keys), sorted(held.values + group.values)
            parts[rope] = Group(None, tuple(keys), tuple(values))
        return [(group, rope) for rope, group in parts.items()]

    def _store(
        self, held: dict[Kind, Storage], rope: RopeConfig | None, channels: int
    ) -> RecentStore:
        def empty(length: int) -> tuple[Storage, Storage]:
            def zeros(array: Array) -> Array:
                return jnp.zeros((*array.shape[:2], length, *array.shape[3:]), array.dtype)

            return jax.tree.map(zeros, held["key"]), jax.tree.map(zeros, held["value"])

        ring = empty(self.budget - self.sinks)
        if not self.sinks:
            return RecentStore(*ring)
        return SinkStore(*ring, *empty(self.sinks), rope, channels)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=[])
@dataclass(frozen=True)
class RecentStore(RingStore):
    """A ring of the last W tokens, more than which no query sees, in whatever call it comes."""

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
        return super().pieces(keys, values, q, near, call)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "sink_keys", "sink_values"],
    meta_fields=["rope", "channels"],
)
@dataclass(frozen=True)
class SinkStore(RecentStore):
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
        rope: by which queries are moved, so that positions count in the cache; None for not at all.
        channels: of a key that rotate.
    """

    sink_keys: Storage
    sink_values: Storage
    rope: RopeConfig | None
    channels: int

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
        ring = tuple(view[:-1] for view in keys), tuple(view[:-1] for view in values)
        recent = [
            piece._replace(mask=self._without_sinks(piece.mask))
            for piece in super().pieces(*ring, q, rows, call)
        ]
        held = jnp.minimum(call.first + call.count, self.sinks)
        first = Piece(
            tuple(view[-1] for view in keys),
            tuple(view[-1] for view in values),
            rows.mask() | {"kv_lengths": held},
            None if self.rope is None else self._extra_rotation(self.rope, rows.positions),
        )
        return (*recent, first)

    def _without_sinks(self, mask: MaskArguments) -> MaskArguments:
        assert "kv_positions" in mask
        held = mask["kv_positions"]
        return mask | {"kv_positions": jnp.where(held < self.sinks, -1, held)}

    def _extra_rotation(self, rope: RopeConfig, positions: Int[Array, "B t"]) -> Rotation:
        missing = jnp.maximum(positions + 1 - self.sinks - self.keys.shape[2], 0)
        parts = extra_rotation(rope, self.channels, -missing.reshape(-1))
        cos, sin = (part.reshape(*positions.shape, -1) for part in parts)
        return cos, sin
