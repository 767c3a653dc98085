"""Which streams a cache holds, and which of them share a store."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from fusedkv_jax.layouts import KINDS, Kind, KVLayout

StreamName = tuple[Kind, int]


@dataclass(frozen=True)
class Group:
    """Streams whose tokens line up: a layer reads all its sources from one group.

    Attributes:
        window: tokens that are kept of each stream; None for all.
        keys: layers whose keys are held, in the order of their slots.
        values: layers whose values are held.
    """

    window: int | None
    keys: tuple[int, ...]
    values: tuple[int, ...]

    def layers(self, kind: Kind) -> tuple[int, ...]:
        return self.keys if kind == "key" else self.values


@dataclass(frozen=True)
class CachePlan:
    """The groups of a cache; static and hashable, as a compiled program depends on it."""

    groups: tuple[Group, ...]

    @functools.cached_property
    def places(self) -> dict[StreamName, tuple[int, int]]:
        """(group, slot in the group's arrays) of every cached stream."""
        return {
            (kind, layer): (g, slot)
            for g, group in enumerate(self.groups)
            for kind in KINDS
            for slot, layer in enumerate(group.layers(kind))
        }

    @functools.cached_property
    def windows(self) -> tuple[int | None, ...]:
        """Stored length of each group; None for all tokens."""
        return tuple(group.window for group in self.groups)


@functools.lru_cache(maxsize=256)
def sequence_plan(layout: KVLayout) -> CachePlan:
    """All streams in one group: those of a call whose tokens are not stored."""
    return CachePlan((Group(None, layout.cached_keys, layout.cached_values),))


@functools.lru_cache(maxsize=256)
def cache_plan(layout: KVLayout) -> CachePlan:
    """The plan of an uncompressed cache: one group for each stored length, all tokens first."""
    stored = {
        (kind, i): layout.stored_window(kind, i) for kind in KINDS for i in layout.cached(kind)
    }
    windows = sorted(set(stored.values()), key=lambda w: (w is not None, w))
    return CachePlan(tuple(_group(w, [s for s in stored if stored[s] == w]) for w in windows))


@functools.lru_cache(maxsize=256)
def split_plan(layout: KVLayout) -> CachePlan:
    """The finest plan: streams share a group only if some layer reads them together.

    Groups may then hold different tokens, and different numbers of them.
    """
    stored = {
        (kind, i): layout.stored_window(kind, i) for kind in KINDS for i in layout.cached(kind)
    }
    owner = {stream: stream for stream in stored}
    for i in range(layout.num_layers):
        together = {owner[kind, j] for kind in KINDS for j in layout.attended(kind, i)}
        first = min(together, key=list(stored).index)
        owner = {stream: first if o in together else o for stream, o in owner.items()}
    return CachePlan(
        tuple(
            _group(stored[first], [s for s in stored if owner[s] == first])
            for first in dict.fromkeys(owner.values())
        )
    )


def _group(window: int | None, streams: Iterable[tuple[str, int]]) -> Group:
    layers = {kind: tuple(i for k, i in streams if k == kind) for kind in KINDS}
    return Group(window, layers["key"], layers["value"])
