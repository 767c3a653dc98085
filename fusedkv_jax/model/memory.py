"""What attention reads: the sequence itself (training) or a cache (inference), one interface.

Both keep a bank: new tokens' streams that layers outside the producer's scanned body will read,
`[slots, B, T, K, H]` per kind. Who reads what is decided by the layout alone, never by whether
there is a cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache import (
    KVCache,
    cache_plan,
    ring_positions,
    write,
    write_ring,
)
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind, Run, exported, runs

Slot = int | np.integer | Array
Stream = Float[Array, "B S K H"]  # all tokens
New = Float[Array, "B T K H"]  # the tokens of this call


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

    def bank_slots(self, kind: Kind, run: Run, place: int) -> list[int] | None:
        """Bank slot of each repeat's layer at one place of a run's body; None if all are unread."""
        kept = self.banked[kind]
        layers = run.layers(place)
        if not set(layers) & set(kept):
            return None
        return [kept.index(i) if i in kept else len(kept) for i in layers]

    def bank(self, state: State, kind: Kind, slot: Slot, new: New) -> State:
        """Keep one layer's new stream for layers outside its body."""
        array = state.bank[kind]
        assert array is not None
        updated = jax.lax.dynamic_update_index_in_dim(array, new.astype(array.dtype), slot, 0)
        return state._replace(bank={**state.bank, kind: updated})

    def fresh(self, state: State, kind: Kind, layer: int) -> New:
        """New tokens' stream of a layer in an earlier run (or of the last pass)."""
        array = state.bank[kind]
        assert array is not None
        return array[self.banked[kind].index(layer)]

    def outer(self, state: State, kind: Kind, layer: int) -> Stream:
        """All tokens' stream of a layer in an earlier run (or of the last pass), for attention."""
        # Every layer that reads it adds to its gradient: in float32, or bfloat16 would round
        # the sum at each layer. The layers cast back, which XLA cancels in the forward pass.
        return self.fresh(state, kind, layer).astype(jnp.float32)

    def store(self, cache: Any, kind: Kind, layer: int, slot: Slot, new: New) -> Any:
        """Put a layer's new stream into the cache."""
        return cache

    def view(self, cache: Any, kind: Kind, layer: int, slot: Slot, new: New) -> Stream:
        """All tokens' stream of a layer that was just stored, for attention."""
        return new

    def mask(self, layer: int, positions: Int[Array, "B T"] | None) -> dict[str, Any]:
        """Masking arguments of the attention operation in a layer."""
        window, strict = self._window(layer)
        mask: dict[str, Any] = {"causal": True, "window": window}
        if self.segment_ids is not None:
            mask |= {"q_segment_ids": self.segment_ids, "kv_segment_ids": self.segment_ids}
        if strict:
            rows, length = self.shape
            mask["q_positions"] = jnp.broadcast_to(jnp.arange(length) - 1, (rows, length))
        return mask

    def _window(self, layer: int) -> tuple[int | None, bool]:
        """Window, and whether a token is hidden from itself: a source above is not there yet."""
        kv = self.layout.layers[layer]
        strict = any(j > layer for j in kv.key.sources + kv.value.sources)
        return (kv.window - 1 if kv.window and strict else kv.window), strict

    def finish(self, state: State) -> KVCache | None:
        """The cache after the call."""
        return state.cache


class CacheMemory(Memory):
    """Streams of a cache, to which the call adds `count` new tokens per row."""

    def __init__(
        self,
        config: ModelConfig,
        cache: KVCache,
        shape: tuple[int, ...],
        count: Int[Array, "B"],
    ):
        self.plan = cache_plan(config.kv_layout)
        self.initial = cache
        self.first, self.count = cache.lengths, count
        super().__init__(config, shape)

    def _banked(self, kind: Kind) -> tuple[int, ...]:
        # Rings are written at the end of the call: until then their new tokens wait in the bank,
        # since early queries of a chunk still need what its late tokens will overwrite.
        rings = {i for i in self.layout.cached(kind) if self.plan.is_ring(kind, i)}
        residual = {
            j
            for run in runs(self.layout)
            for i in range(run.start, run.stop)
            if self.layout.layers[i].stream(kind).is_residual
            for j in self.layout.layers[i].stream(kind).sources
            if not run.is_local(i, j)
        }
        return tuple(sorted(rings | residual))

    def _cache(self) -> KVCache:
        return self.initial

    @property
    def positions(self) -> Int[Array, "B T"]:
        """Positions of the new tokens."""
        return self.first[:, None] + jnp.arange(self.shape[1], dtype=jnp.int32)

    def outer(self, state: State, kind: Kind, layer: int) -> Stream:
        slot = self.plan.places[kind, layer][1]
        ring = self.plan.is_ring(kind, layer)
        new = self.fresh(state, kind, layer) if ring else None
        return self.view(state.cache, kind, layer, slot, new)

    def store(self, cache: Any, kind: Kind, layer: int, slot: Slot, new: New) -> Any:
        if self.plan.is_ring(kind, layer):
            return cache
        group = self.plan.places[kind, layer][0]
        array = write(_arrays(cache, kind)[group], slot, new, self.first, self.count)
        return _with_array(cache, kind, group, array)

    def view(self, cache: Any, kind: Kind, layer: int, slot: Slot, new: New | None) -> Stream:
        array = _arrays(cache, kind)[self.plan.places[kind, layer][0]]
        stored = jax.lax.dynamic_index_in_dim(array, slot, keepdims=False)
        if new is None or not self.plan.is_ring(kind, layer):
            return stored
        return jnp.concatenate([stored.astype(new.dtype), new], axis=1)

    def mask(self, layer: int, positions: Int[Array, "B T"] | None) -> dict[str, Any]:
        window, strict = self._window(layer)
        positions = self.positions if positions is None else positions
        mask: dict[str, Any] = {
            "causal": True,
            "window": window,
            "q_positions": positions - strict,
        }
        source = self.layout.attended("key", layer)[0]
        group = self.plan.places["key", source][0]
        if self.plan.windows[group] is None:
            return mask | {"kv_lengths": self.first + self.count}
        slots = next(
            a for a in (self.initial.keys[group], self.initial.values[group]) if a is not None
        )
        old = ring_positions(self.first, slots.shape[2])
        is_new = jnp.arange(self.shape[1]) < self.count[:, None]
        new = jnp.where(is_new, self.positions, -1)
        return mask | {"kv_positions": jnp.concatenate([old, new], axis=1)}

    def finish(self, state: State) -> KVCache:
        cache = state.cache
        assert cache is not None
        for kind in KINDS:
            for group, window in enumerate(self.plan.windows):
                array, bank = _arrays(cache, kind)[group], state.bank[kind]
                if window is None or array is None or bank is None:
                    continue
                layers = [
                    i for i in self.layout.cached(kind) if self.plan.places[kind, i][0] == group
                ]
                new = bank[jnp.asarray([self.banked[kind].index(i) for i in layers])]
                update = jax.vmap(write_ring, in_axes=(0, 0, None, None))
                cache = _with_array(cache, kind, group, update(array, new, self.first, self.count))
        return dataclasses.replace(cache, lengths=self.first + self.count)


def _arrays(cache: KVCache, kind: Kind) -> tuple[Any, ...]:
    return cache.keys if kind == "key" else cache.values


def _with_array(cache: KVCache, kind: Kind, group: int, array: Array) -> KVCache:
    arrays = tuple(array if g == group else a for g, a in enumerate(_arrays(cache, kind)))
    field = "keys" if kind == "key" else "values"
    return dataclasses.replace(cache, **{field: arrays})
