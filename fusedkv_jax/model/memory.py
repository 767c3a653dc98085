"""What attention reads: the sequence itself (training) or a cache (inference), one interface.

Both keep a bank: new tokens' streams that layers outside the producer's scanned body will read,
`[slots, B, T, K, H]` per kind. Who reads what is decided by the layout alone, never by whether
there is a cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache import Call, KVCache, Piece, Reading, Rows, constrain_cache
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind, Run, exported, runs
from pallas_kernels.quantized import Quantized

Slot = int | np.integer | Array
New = Float[Array, "B T K H"]  # the tokens of this call
View = Any  # a source as a memory reads it; an array [B, S, K, H] in training


class State(NamedTuple):
    """What the layers of one call hand upwards.

    Attributes:
        bank: new tokens' streams per kind, [slots, B, T, K, H]; None where nobody needs any.
        cache: the cache, or None in training.
    """

    bank: dict[Kind, Array | None]
    cache: KVCache | None


class Memory:
    """Streams of the sequence that is passed in: training, and scoring of whole sequences."""

    differentiable = True

    def __init__(
        self,
        config: ModelConfig,
        shape: tuple[int, ...],
        segment_ids: Int[Array, "B T"] | None = None,
    ):
        self.config, self.layout = config, config.kv_layout
        self.shape = shape
        self.segment_ids = segment_ids
        self.banked = {kind: self._banked(kind) for kind in KINDS}

    def _banked(self, kind: Kind) -> tuple[int, ...]:
        return exported(self.layout, kind)

    def start(self, dtype: Any) -> State:
        """Empty bank; the last slot takes what nobody reads, where a scan writes all its layers."""
        bank: dict[Kind, Array | None] = {}
        for kind in KINDS:
            kept = self.banked[kind]
            spill = any(
                0 < len(set(run.layers(place)) & set(kept)) < run.repeats
                for run in runs(self.layout)
                for place in range(run.period)
            )
            shape = (len(kept) + spill, *self.shape, *self.config.stream_shapes[kind])
            bank[kind] = jnp.zeros(shape, dtype) if kept else None
        return State(bank, self._cache())

    def _cache(self) -> KVCache | None:
        return None

    def passes(self) -> tuple[int, int]:
        """How often a cyclic span is iterated, without and then with gradient."""
        return self.layout.passes

    def segments(self, run: Run) -> tuple[range, ...]:
        """The repeats of a run's body, cut where they keep their streams in different ways."""
        return (range(run.repeats),)

    def bank_slots(self, kind: Kind, run: Run, place: int) -> list[int] | None:
        """Bank slot of each repeat's layer at one place of a run's body; None if all are unread."""
        kept = self.banked[kind]
        layers = run.layers(place)
        if not set(layers) & set(kept):
            return None
        return [kept.index(i) if i in kept else len(kept) for i in layers]

    def slots(self, kind: Kind, layers: Sequence[int]) -> list[int]:
        """Where each layer's stream is stored."""
        return [0] * len(layers)

    def bank(self, state: State, kind: Kind, slot: Slot, new: New) -> State:
        """Keep one layer's new stream for layers outside its body."""
        array = state.bank[kind]
        assert array is not None
        updated = jax.lax.dynamic_update_index_in_dim(array, new.astype(array.dtype), slot, 0)
        return state._replace(bank={**state.bank, kind: updated})

    def rebanked(self, state: State, passed: State, layers: range) -> State:
        """`passed`, but the bank slots of all other layers as in `state`, with their gradients."""
        if not self.differentiable:
            return passed
        bank: dict[Kind, Array | None] = {}
        for kind, array in passed.bank.items():
            old, kept = state.bank[kind], self.banked[kind]
            others = np.asarray([slot for slot, i in enumerate(kept) if i not in layers], np.int32)
            if old is None or array is None or not others.size:
                bank[kind] = array
            else:
                bank[kind] = array.at[others].set(old[others])
        return passed._replace(bank=bank)

    def fresh(self, state: State, kind: Kind, layer: int) -> New:
        """New tokens' stream of a layer in an earlier run (or of the last pass)."""
        array = state.bank[kind]
        assert array is not None
        return array[self.banked[kind].index(layer)]

    def outer(self, state: State, kind: Kind, layer: int) -> View:
        """All tokens' stream of a layer in an earlier run (or of the last pass), for attention."""
        # Every layer that reads it adds to its gradient: in float32, or bfloat16 would round
        # the sum at each layer. The attention operation rounds back, which XLA cancels in the
        # forward pass, and returns float32 gradients.
        return self.fresh(state, kind, layer).astype(jnp.float32)

    def store(self, cache: Any, kind: Kind, layer: int, slot: Slot, new: New) -> Any:
        """Put a layer's new stream into the cache."""
        return cache

    def view(self, cache: Any, kind: Kind, layer: int, slot: Slot, new: New) -> View:
        """All tokens' stream of a layer that was just stored, for attention."""
        return new

    def rows(self, layer: int, positions: Int[Array, "B T"]) -> Rows:
        """The queries of a layer: hidden from themselves if they read one that is not there yet."""
        kv = self.layout.layers[layer]
        strict = any(j > layer for j in kv.key.sources + kv.value.sources)
        return Rows(positions, kv.window, strict)

    def pieces(
        self,
        cache: Any,
        layer: int,
        views: tuple[tuple[View, ...], tuple[View, ...]],
        q: Float[Array, "B T N H"],
        positions: Int[Array, "B T"] | None,
    ) -> tuple[Piece, ...]:
        """What the queries of a layer attend to.

        Args:
            cache: the cache.
            layer: the layer.
            views: of its key and of its value sources.
            q: the queries.
            positions: of the queries, if they are not those of all new tokens.
        """
        rows = self.rows(layer, jnp.broadcast_to(jnp.arange(self.shape[1]), self.shape))
        mask = rows.mask()
        if not rows.strict:
            del mask["q_positions"]  # the default, which is known while tracing
        if self.segment_ids is not None:
            mask |= {"q_segment_ids": self.segment_ids, "kv_segment_ids": self.segment_ids}
        return (Piece(*views, mask),)

    def watches(self, layer: int) -> bool:
        """The cache wants to see what this layer reads."""
        return False

    def watch(self, cache: Any, reading: Reading) -> Any:
        """The cache after a layer has read it."""
        return cache

    def finish(self, state: State) -> KVCache | None:
        """The cache after the call."""
        return state.cache


class CacheMemory(Memory):
    """Streams of a cache, to which a call adds new tokens."""

    differentiable = False

    def __init__(self, config: ModelConfig, cache: KVCache, call: Call):
        self.initial, self.plan, self.call = cache, cache.plan, call
        super().__init__(config, (call.first.shape[0], call.length))

    def _banked(self, kind: Kind) -> tuple[int, ...]:
        deferred = {i for i in self.layout.cached(kind) if self._deferred(kind, i)}
        residual = {
            j
            for run in runs(self.layout)
            for i in range(run.start, run.stop)
            if self.layout.layers[i].stream(kind).is_residual
            for j in self.layout.layers[i].stream(kind).sources
            if not run.is_local(i, j)
        }
        return tuple(sorted(deferred | residual))

    def _deferred(self, kind: Kind, layer: int) -> bool:
        return self.initial.stores[self.plan.places[kind, layer][0]].deferred(self.call)

    def _group(self, layer: int) -> int:
        """The group that a layer reads."""
        return self.plan.places["key", self.layout.attended("key", layer)[0]][0]

    def _cache(self) -> KVCache:
        return self.initial

    def passes(self) -> tuple[int, int]:
        total = min(sum(self.layout.passes), self.call.length)
        return total - 1, 1

    def segments(self, run: Run) -> tuple[range, ...]:
        def groups(repeat: int) -> list[int | None]:
            layers = [run.start + repeat * run.period + place for place in range(run.period)]
            found = [self.plan.places.get((kind, i), (None,))[0] for i in layers for kind in KINDS]
            return found + [self._group(i) for i in layers]

        starts = [r for r in range(run.repeats) if r == 0 or groups(r) != groups(r - 1)]
        stops = [*starts[1:], run.repeats]
        return tuple(map(range, starts, stops))

    def slots(self, kind: Kind, layers: Sequence[int]) -> list[int]:
        return [self.plan.places[kind, i][1] for i in layers]

    def outer(self, state: State, kind: Kind, layer: int) -> View:
        new = self.fresh(state, kind, layer) if self._deferred(kind, layer) else None
        return self.view(state.cache, kind, layer, self.plan.places[kind, layer][1], new)

    def store(self, cache: Any, kind: Kind, layer: int, slot: Slot, new: New) -> Any:
        group = self.plan.places[kind, layer][0]
        return with_store(cache, group, cache.stores[group].write(kind, slot, new, self.call))

    def view(self, cache: Any, kind: Kind, layer: int, slot: Slot, new: New | None) -> View:
        store = cache.stores[self.plan.places[kind, layer][0]]
        return store.view(kind, slot, new if store.deferred(self.call) else None, self.call)

    def pieces(self, cache, layer, views, q, positions) -> tuple[Piece, ...]:
        rows = self.rows(layer, self.call.positions if positions is None else positions)
        pieces = cache.stores[self._group(layer)].pieces(*views, q, rows, self.call)
        return tuple(_cast(piece, q.dtype) for piece in pieces)

    def watches(self, layer: int) -> bool:
        return self.initial.stores[self._group(layer)].watches

    def watch(self, cache: Any, reading: Reading) -> Any:
        group = self._group(reading.layer)
        return with_store(cache, group, cache.stores[group].watch(reading, self.call))

    def finish(self, state: State) -> KVCache:
        cache = state.cache
        assert cache is not None
        for index, group in enumerate(self.plan.groups):
            store, new = cache.stores[index], {}
            if store.deferred(self.call):
                for kind in KINDS:
                    slots = [self.banked[kind].index(i) for i in group.layers(kind)]
                    bank = state.bank[kind]
                    assert bank is not None
                    new[kind] = bank[np.asarray(slots)]
            cache = with_store(cache, index, store.finish(new, self.call))
        return constrain_cache(
            dataclasses.replace(cache, lengths=self.call.first + self.call.count)
        )


def with_store(cache: KVCache, index: int, store: Any) -> KVCache:
    """The cache with another store in one of its places."""
    stores = (*cache.stores[:index], store, *cache.stores[index + 1 :])
    return dataclasses.replace(cache, stores=stores)


def _cast(piece: Piece, dtype: Any) -> Piece:
    """Arrays in the type of the queries; codes stay as they are."""

    def cast(sources: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x if isinstance(x, Quantized) else x.astype(dtype) for x in sources)

    return piece._replace(keys=cast(piece.keys), values=cast(piece.values))
