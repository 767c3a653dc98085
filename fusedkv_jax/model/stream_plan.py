"""Where the streams of a call are: in which store, and which of them wait in the bank meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from fusedkv_jax.cache import CachePlan, Store
from fusedkv_jax.cache.calls import Call
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind, KVLayout, exported, runs

Bank = dict[Kind, Array | None]


@dataclass(frozen=True)
class StreamPlan:
    """Where the streams of a call are; static, as a compiled program depends on it.

    Attributes:
        config: of the model.
        groups: which streams share a store.
        banked: layers whose new keys, and whose new values, wait in the bank.
    """

    config: ModelConfig
    groups: CachePlan
    banked: tuple[tuple[int, ...], tuple[int, ...]]

    @classmethod
    def of(
        cls, config: ModelConfig, groups: CachePlan, stores: tuple[Store, ...], call: Call
    ) -> StreamPlan:
        """The plan of one call, whose stores say which streams have to wait."""
        keys, values = (_banked(config.kv_layout, kind, groups, stores, call) for kind in KINDS)
        return cls(config, groups, (keys, values))

    @property
    def layout(self) -> KVLayout:
        return self.config.kv_layout

    def banked_layers(self, kind: Kind) -> tuple[int, ...]:
        return self.banked[KINDS.index(kind)]

    def group_of(self, layer: int) -> int:
        """The group that the attention of a layer reads."""
        return self.groups.places["key", self.layout.attended("key", layer)[0]][0]

    def empty_bank(self, rows: int, length: int) -> Bank:
        """Zeros [slots, B, T, K, H] per kind; None where no stream waits."""
        bank: Bank = {}
        for kind in KINDS:
            kept = self.banked_layers(kind)
            # A scan writes all its layers: those that nobody reads share one more slot. So only
            # what is read takes memory: FusedKV banks those of two layers, whatever its depth.
            spill = any(
                0 < len(set(run.layers(place)) & set(kept)) < run.repeats
                for run in runs(self.layout)
                for place in range(run.period)
            )
            shape = (len(kept) + spill, rows, length, *self.config.stream_shapes[kind])
            bank[kind] = jnp.zeros(shape, self.config.dtype) if kept else None
        return bank

    def bank_slots(self, kind: Kind, layers: range) -> list[int] | None:
        """Bank slot of each layer at one place of a run's body; None if all are unread."""
        kept = self.banked_layers(kind)
        if not set(layers) & set(kept):
            return None
        return [kept.index(i) if i in kept else len(kept) for i in layers]


def _banked(
    layout: KVLayout, kind: Kind, groups: CachePlan, stores: tuple[Store, ...], call: Call
) -> tuple[int, ...]:
    """Layers whose new streams have to wait for others, or for the end of the call."""
    outside, residual = set(exported(layout, kind)), set()
    for run in runs(layout):
        for i in range(run.start, run.stop):
            stream = layout.layers[i].stream(kind)
            if stream.is_residual:
                residual |= {j for j in stream.sources if not run.is_local(i, j)}
    found = set(residual)
    for i in layout.cached(kind):
        store = stores[groups.places[kind, i][0]]
        if store.writes_at_end(call) and (i in outside or not store.transient):
            found.add(i)
    return tuple(sorted(found))
