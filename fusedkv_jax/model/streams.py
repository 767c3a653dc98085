"""The key and value streams of one call: layers put theirs, and read what their layout names.

Training and decoding differ in the stores alone (`SequenceStore` holds nothing, the others are a
cache): who reads what is decided by the layout, never by whether there is a cache.

What a layer has put is read in three ways. A layer of the same scanned body finds it at hand. A
layer of a later run reads the store, once for all layers of that run. Where a store cannot tell
yet (it holds nothing, or writes at the end of the call), and where the new tokens alone are wanted
(residuals), the stream waits in the bank.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache import KVCache, Store
from fusedkv_jax.cache.calls import Call, Piece, Reading, Rows, Source, View
from fusedkv_jax.cache.paged import PagedCall, PagedStore
from fusedkv_jax.cache.plan import StreamName, sequence_plan
from fusedkv_jax.cache.sequence import SequenceStore
from fusedkv_jax.cache.shardings import constrain_cache
from fusedkv_jax.cache.storage import Slot
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind, Run
from fusedkv_jax.model.mixing import mix
from fusedkv_jax.model.stream_plan import Bank, StreamPlan
from pallas_kernels import PagedStream, Quantized, Stacked

New = Float[Array, "B T K H"]  # the tokens of this call


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["bank", "stores", "call", "views", "new", "slots"],
    meta_fields=["plan"],
)
@dataclass(frozen=True)
class Streams:
    """The streams of a call so far; every method gives new ones.

    Attributes:
        bank: new tokens' streams for layers outside the producer's body, [slots, B, T, K, H].
        stores: one for each group of the plan.
        call: the tokens.
        views: what the layers of the present run read from outside their body.
        new: new tokens' streams at hand: of the present body, and residuals from outside it.
        slots: places in their stores of the streams of the present body.
        plan: which streams are where.
    """

    bank: Bank
    stores: tuple[Store, ...]
    call: Call
    views: dict[StreamName, View]
    new: dict[StreamName, Array]
    slots: dict[StreamName, Slot]
    plan: StreamPlan

    @classmethod
    def of_sequence(
        cls, config: ModelConfig, shape: tuple[int, ...], segment_ids: Int[Array, "B T"] | None
    ) -> Streams:
        """For a call that attends to its own tokens only: training, scoring of whole sequences.

        Args:
            config: of the model.
            shape: rows B and columns T.
            segment_ids: document of each token.
        """
        rows, length = shape
        count: Any = np.full(rows, length, np.int32)  # known while tracing
        call, stores = Call(None, count, length, segment_ids), (SequenceStore(),)
        plan = StreamPlan.of(config, sequence_plan(config.kv_layout), stores, call)
        return cls._start(plan, stores, call)

    @classmethod
    def of_cache(
        cls, config: ModelConfig, cache: KVCache, call: Call, plan: StreamPlan | None = None
    ) -> Streams:
        """For a call that adds tokens to a cache.

        Args:
            config: of the model.
            cache: the cache.
            call: the tokens.
            plan: of another call, for which streams are to wait in the bank as well.
        """
        plan = plan or StreamPlan.of(config, cache.plan, cache.stores, call)
        return cls._start(plan, cache.stores, call)

    @classmethod
    def of_pages(cls, config: ModelConfig, pool: PagedStore, call: PagedCall) -> Streams:
        """For a call that adds tokens of many requests to a pool of pages.

        Args:
            config: of the model.
            pool: holds all its cached streams.
            call: the tokens.
        """
        plan = StreamPlan.of(config, sequence_plan(config.kv_layout), (pool,), call)
        return cls._start(plan, (pool,), call)

    def narrowed(self, call: Call) -> Streams:
        """For queries of fewer tokens, which put nothing any more."""
        return dataclasses.replace(self, call=call)

    @classmethod
    def _start(cls, plan: StreamPlan, stores: tuple[Store, ...], call: Call) -> Streams:
        bank = plan.empty_bank(*call.shape)
        return cls(bank, stores, call, {}, {}, {}, plan)

    # What a layer does.

    def put(
        self,
        layer: int,
        own: dict[Kind, Array],
        slots: Mapping[Kind, Slot],
        weights: dict[Kind, Array],
    ) -> Streams:
        """With a layer's new streams, its residuals mixed in, in the stores and at hand.

        Args:
            layer: the layer; where equal layers are scanned, the first of them.
            own: its projections, [B, T, K, H].
            slots: their places in the stores.
            weights: of the residuals, [J, K, H].
        """
        streams, kv = self, self.plan.layout.layers[layer]
        for kind, tokens in own.items():
            stream = kv.stream(kind)
            if stream.is_residual:
                terms = [self.new[kind, j] for j in stream.sources]
                # Mixed before it is stored: a residual costs nothing when it is read, and those who
                # read it see what this layer attends to.
                tokens = mix(weights[kind], [*terms, tokens])
            group = self.plan.groups.places[kind, layer][0]
            store = streams.stores[group].write(kind, slots[kind], tokens, self.call)
            name = kind, layer
            streams = dataclasses.replace(
                streams._with_store(group, store),
                new=streams.new | {name: tokens},
                slots=streams.slots | {name: slots[kind]},
            )
        return streams

    def read(
        self, layer: int, q: Float[Array, "B T N H"], positions: Int[Array, "B T"] | None
    ) -> tuple[Piece, ...]:
        """What the queries of a layer attend to; `positions` as for `rows`."""
        keys, values = (
            tuple(self._view(kind, j) for j in self.plan.layout.attended(kind, layer))
            for kind in KINDS
        )
        store = self.stores[self.plan.group_of(layer)]
        pieces = store.pieces(keys, values, q, self.rows(layer, positions), self.call)
        # A stream that many layers read stays in float32, the type in which their gradients add up.
        if store.transient:
            return pieces
        return tuple(_cast(piece, q.dtype) for piece in pieces)

    def rows(self, layer: int, positions: Int[Array, "B T"] | None) -> Rows:
        """The queries of a layer: hidden from themselves if they read one that is not there yet.

        Args:
            layer: the layer.
            positions: of the queries, if they are not those of all new tokens.
        """
        kv = self.plan.layout.layers[layer]
        strict = any(j > layer for j in kv.key.sources + kv.value.sources)
        return Rows(self.call.positions if positions is None else positions, kv.window, strict)

    def locate(self, layer: int) -> dict[Kind, tuple[Slot, ...]]:
        """Places in their store of the sources that a layer reads."""
        layout = self.plan.layout
        return {
            kind: tuple(self._slot((kind, j)) for j in layout.attended(kind, layer))
            for kind in KINDS
        }

    def watches(self, layer: int) -> bool:
        """The store that a layer reads wants to see what it reads."""
        return self.stores[self.plan.group_of(layer)].watches

    def observe(self, reading: Reading) -> Streams:
        """With what the store has learned from a layer's reading."""
        if not self.watches(reading.layer):
            return self
        group = self.plan.group_of(reading.layer)
        return self._with_store(group, self.stores[group].watch(reading, self.call))

    # What the walk through the layers does.

    @property
    def transient(self) -> bool:
        """Nothing outlives the call: gradients can flow."""
        return all(store.transient for store in self.stores)

    def passes(self) -> tuple[int, int]:
        """How often a cyclic group is iterated, without and then with gradient.

        A cache wants no gradient, and is exact after as many passes as there are tokens.
        """
        passes = self.plan.layout.passes
        return passes if self.transient else (min(sum(passes), self.call.length) - 1, 1)

    def segments(self, run: Run) -> tuple[range, ...]:
        """The repeats of a run's body, cut where they use other stores: a scan has one of each."""
        places = self.plan.groups.places

        def groups(repeat: int) -> list[int | None]:
            layers = [run.start + repeat * run.period + place for place in range(run.period)]
            written = [places.get((kind, i), (None,))[0] for i in layers for kind in KINDS]
            return written + [self.plan.group_of(i) for i in layers]

        starts = [r for r in range(run.repeats) if r == 0 or groups(r) != groups(r - 1)]
        stops = [*starts[1:], run.repeats]
        return tuple(map(range, starts, stops))

    def enter(self, run: Run) -> Streams:
        """With what the layers of a run read from outside their body, read once for all."""
        # Before the scan, not in it: inside, each layer would slice the cache or dequantize it
        # again, and differentiation would keep a copy for each of them.
        views, new = {}, {}
        for i in range(run.start, run.start + run.period):
            for kind in KINDS:
                stream = self.plan.layout.layers[i].stream(kind)
                for j in stream.sources:
                    if j < i and run.is_local(i, j):
                        continue
                    if stream.is_residual:
                        new[kind, j] = self.banked(kind, j)
                    else:
                        views[kind, j] = self._outer_view(kind, j)
        return dataclasses.replace(self, views=views, new=new, slots={})

    def banked(self, kind: Kind, layer: int) -> New:
        """New tokens' stream of a layer in an earlier run (or of the last pass)."""
        array = self.bank[kind]
        assert array is not None
        return array[self.plan.banked_layers(kind).index(layer)]

    def keep(self, new: dict[StreamName, Array], slots: Mapping[Kind, Slot]) -> Streams:
        """With new streams in the bank, at the named slots."""
        bank = dict(self.bank)
        for (kind, _), tokens in new.items():
            if kind in slots:
                array = bank[kind]
                assert array is not None
                # In place: the array is in the loop's state, so XLA reuses its memory. A scan's
                # stacked outputs would hold the streams of all layers instead of those in need.
                bank[kind] = jax.lax.dynamic_update_index_in_dim(
                    array, tokens.astype(array.dtype), slots[kind], 0
                )
        return dataclasses.replace(self, bank=bank)

    def iterated(self, passed: Streams, layers: range) -> Streams:
        """After passes of a cyclic group; streams of other layers keep their gradients."""
        if not self.transient:
            return passed
        bank: Bank = {}
        for kind in KINDS:
            array, old, kept = passed.bank[kind], self.bank[kind], self.plan.banked_layers(kind)
            others = np.asarray([slot for slot, i in enumerate(kept) if i not in layers], np.int32)
            if array is None or old is None or not others.size:
                bank[kind] = array
            else:
                # The free passes cut gradients off. Streams from outside the group have not changed
                # in them, and what reads these has to reach the layers that made them.
                bank[kind] = array.at[others].set(old[others])
        return dataclasses.replace(passed, bank=bank)

    def close(self) -> KVCache:
        """The cache after the call."""
        stores = []
        for store, group in zip(self.stores, self.plan.groups.groups, strict=True):
            new = {}
            for kind in KINDS if store.writes_at_end(self.call) else ():
                kept, bank = self.plan.banked_layers(kind), self.bank[kind]
                if bank is not None:
                    new[kind] = bank[np.asarray([kept.index(i) for i in group.layers(kind)])]
            stores.append(store.finish(new, self.call))
        lengths = self.call.first + self.call.count
        return constrain_cache(KVCache(tuple(stores), lengths, self.plan.groups))

    def _slot(self, name: StreamName) -> Slot:
        return self.slots[name] if name in self.slots else self.plan.groups.places[name][1]

    def _view(self, kind: Kind, layer: int) -> View:
        """A stream that a layer reads: of its own body, or from outside."""
        name = kind, layer
        if name not in self.slots:
            return self.views[name]
        store = self.stores[self.plan.groups.places[name][0]]
        new = self.new[name] if store.writes_at_end(self.call) else None
        return store.view(kind, self.slots[name], new, self.call)

    def _outer_view(self, kind: Kind, layer: int) -> View:
        group, slot = self.plan.groups.places[kind, layer]
        store = self.stores[group]
        new = self.banked(kind, layer) if store.writes_at_end(self.call) else None
        return store.shared(store.view(kind, slot, new, self.call))

    def _with_store(self, group: int, store: Store) -> Streams:
        stores = (*self.stores[:group], store, *self.stores[group + 1 :])
        return dataclasses.replace(self, stores=stores)


def _cast(piece: Piece, dtype: DTypeLike) -> Piece:
    """Arrays in the type of the queries; codes stay as they are."""

    def cast(sources: tuple[Source, ...]) -> tuple[Source, ...]:
        stored = (Quantized, Stacked, PagedStream)
        return tuple(x if isinstance(x, stored) else x.astype(dtype) for x in sources)

    return piece._replace(keys=cast(piece.keys), values=cast(piece.values))
