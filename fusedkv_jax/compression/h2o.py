"""H2O: keep the tokens that have received most attention so far, and the last ones."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache import KVCache, Store
from fusedkv_jax.cache.calls import Call, Piece, Reading, Rows, View
from fusedkv_jax.cache.plan import Group
from fusedkv_jax.cache.storage import Slot, Storage, encode, take_tokens
from fusedkv_jax.cache.stores import storage_of
from fusedkv_jax.compression import scoring
from fusedkv_jax.compression.compressor import (
    Chunk,
    CompressionError,
    Compressor,
    check_count,
    check_flags,
)
from fusedkv_jax.compression.token_sets import (
    merged,
    readers,
    refuse_windows,
    storages,
    token_sets,
)
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind
from fusedkv_jax.model import Decoder
from fusedkv_jax.trees import Leaf

Masses = list[Float[Array, "B K _"]]  # attention received by each token, for each set of streams


@dataclass(frozen=True)
class H2O(Compressor):
    """Heavy hitters (arXiv 2306.14048): each new token overwrites the least attended one.

    A token's score is the attention probability that it has received from all queries since it
    came, averaged over the query heads of a KV head and added up over the layers that read it. So
    a prompt runs through all layers: prefill does not stop at `prefill_depth`.

    Attributes:
        budget: tokens that are kept.
        recent: last tokens that stay whatever they score; half of the budget by default.
        decode_scores: attention of generated tokens counts as well; otherwise the prompt's only.

    Raises:
        CompressionError: a field is out of range.
    """

    budget: int = 1024
    recent: int | None = None
    decode_scores: bool = True

    title: ClassVar[str] = "H2O"
    rewinds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count(self, "budget")
        check_flags(self, "decode_scores")
        if self.recent is None:
            object.__setattr__(self, "recent", self.budget // 2)
        check_count(self, "recent", least=0)
        if self.window >= self.budget:
            raise CompressionError(
                f"H2O: recent={self.recent} leaves nothing to evict of budget={self.budget};"
                " use less than the budget"
            )

    @property
    def window(self) -> int:
        """`recent`, after its default."""
        assert self.recent is not None
        return self.recent

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        refuse_windows(self.title, config.kv_layout, CompressionError)

    def begin(self, config: ModelConfig, cache: KVCache) -> tuple[KVCache, Masses | None]:
        cache, _ = super().begin(config, cache)
        groups, capacity = token_sets(config.kv_layout), cache.capacity
        if not groups or capacity is None or self.budget >= capacity:
            return cache, None
        shape = (len(cache.lengths), config.kv_heads, capacity)
        return cache, [jnp.zeros(shape, jnp.float32) for _ in groups]

    def observe(
        self, model: Decoder, chunk: Chunk, cache: KVCache, observed: Masses | None
    ) -> tuple[KVCache, Masses | None]:
        if observed is None:
            return super().observe(model, chunk, cache, observed)
        return self._run(model, chunk, cache, observed)[1:]

    def compress(
        self, model: Decoder, chunk: Chunk, cache: KVCache, observed: Masses | None
    ) -> tuple[Float[Array, "B V"], KVCache]:
        if observed is None:
            return super().compress(model, chunk, cache, observed)
        logits, cache, masses = self._run(model, chunk, cache, observed)
        return logits, self._compressed(cache, token_sets(model.config.kv_layout), masses)

    def _run(
        self, model: Decoder, chunk: Chunk, cache: KVCache, masses: Masses
    ) -> tuple[Float[Array, "B V"], KVCache, Masses]:
        """Logits, the extended cache, and the masses with what the chunk's queries attend to."""
        layout, end = model.config.kv_layout, cache.lengths + chunk.count
        kv_heads = model.config.kv_heads

        def watch(reading: Reading) -> Float[Array, "B K S"]:
            place = reading.rows.positions
            place = jnp.where(place < end[:, None], place, -1)
            return scoring.per_kv_head(scoring.received(reading, place, end), kv_heads)

        tokens = chunk.tokens, chunk.count
        logits, cache, found = model.observe(*tokens, cache, watch, rows=chunk.width)
        layers = [readers(layout, group) for group in token_sets(layout)]
        new = [sum(found[i] for i in read) for read in layers]
        return logits, cache, jax.tree.map(jnp.add, masses, new)

    def _compressed(self, cache: KVCache, groups: Sequence[Group], masses: Masses) -> KVCache:
        whole = next(group for group in cache.plan.groups if group.window is None)
        index = [scoring.keep(mass, cache.lengths, self.budget, self.window) for mass in masses]
        sets = {
            kind: tuple(
                next(m for m, group in enumerate(groups) if layer in group.layers(kind))
                for layer in whole.layers(kind)
            )
            for kind in KINDS
        }
        kept = jnp.stack(index)  # [M, B, K, C]
        found = storages(cache, whole)
        keys, values = (take_tokens(found[kind], kept[jnp.asarray(sets[kind])]) for kind in KINDS)
        mass = jnp.take_along_axis(jnp.stack(masses), kept, axis=3)
        place = jnp.zeros(kept.shape[:3], jnp.int32)
        static = (sets["key"], sets["value"], self.window, self.decode_scores)
        store = HeavyStore(keys, values, mass, kept, place, *static)
        return merged(cache, [whole], [store.prepared(cache.lengths, jnp.ones_like(cache.lengths))])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "mass", "positions", "next_place"],
    meta_fields=["key_sets", "value_sets", "recent", "accumulate"],
)
@dataclass(frozen=True)
class HeavyStore(Store):
    """C tokens of each of M sets of streams and each KV head, in any order.

    Attributes:
        keys: storage [P, B, C, K, H].
        values: storage [P, B, C, K, H'].
        mass: attention received by each token, float32 [M, B, K, C].
        positions: of the tokens, int32 [M, B, K, C].
        next_place: where the next token goes, int32 [M, B, K].
        key_sets: the set of each key stream.
        value_sets: the set of each value stream.
        recent: last tokens, the next one included, that are not overwritten.
        accumulate: later queries add to the mass.
    """

    keys: Storage
    values: Storage
    mass: Leaf
    positions: Leaf
    next_place: Leaf
    key_sets: tuple[int, ...]
    value_sets: tuple[int, ...]
    recent: int
    accumulate: bool

    watches: ClassVar[bool] = True

    def _set(self, kind: Kind, slot: Slot) -> Int[Array, ""]:
        sets = self.key_sets if kind == "key" else self.value_sets
        return jnp.asarray(sets, jnp.int32)[slot]

    def write(self, kind: Kind, slot: Slot, new: Float[Array, "B T K H"], call: Call) -> HeavyStore:
        if call.length != 1:
            raise CompressionError(
                f"H2O evicts after every token, but {call.length} came at once; decode without"
                " speculation"
            )
        storage = storage_of(self, kind)
        place = self.next_place[self._set(kind, slot)]  # [B, K]
        place = jnp.where(call.count[:, None] > 0, place, storage.shape[2])  # dropped
        rows, heads = (jnp.arange(size) for size in place.shape)

        def put(array: Array, part: Array) -> Array:
            return array.at[slot, rows[:, None], place, heads].set(part[:, 0], mode="drop")

        return self._with(kind, jax.tree.map(put, storage, encode(new, storage)))

    def pieces(
        self,
        keys: tuple[View, ...],
        values: tuple[View, ...],
        q: Float[Array, "B t N H"],
        rows: Rows,
        call: Call,
    ) -> tuple[Piece, ...]:
        held = jnp.minimum(call.first + call.count, self.keys.shape[2])
        return (Piece(keys, values, {"causal": False, "kv_lengths": held}),)

    def watch(self, reading: Reading, call: Call) -> HeavyStore:
        if not self.accumulate:
            return self
        end = jnp.full_like(reading.rows.positions, self.keys.shape[2])  # whatever is there
        mask = reading.pieces[0].mask
        assert "kv_lengths" in mask
        mass = scoring.received(reading, end, mask["kv_lengths"])
        mass = scoring.per_kv_head(mass, self.mass.shape[2])
        mass = jnp.where(call.count[:, None, None] > 0, mass, 0)
        found = self._set("key", reading.slots["key"][0])
        return dataclasses.replace(self, mass=self.mass.at[found].add(mass))

    def finish(self, new: dict[Kind, Array], call: Call) -> HeavyStore:
        return self.prepared(call.first + call.count, call.count)

    def prepared(self, lengths: Int[Array, "B"], count: Int[Array, "B"]) -> HeavyStore:
        """The store with a place for the token at position `lengths`, in rows that have had one."""
        slots = self.keys.shape[2]
        lengths = lengths[None, :, None]
        old = self.positions <= lengths[..., None] - self.recent
        least = jnp.argmin(jnp.where(old, self.mass, jnp.inf), axis=3)
        place = jnp.where(lengths < slots, lengths, least).astype(jnp.int32)
        place = jnp.where(count[None, :, None] > 0, place, self.next_place)
        chosen = (jnp.arange(slots) == place[..., None]) & (count[None, :, None, None] > 0)
        return dataclasses.replace(
            self,
            mass=jnp.where(chosen, 0, self.mass),
            positions=jnp.where(chosen, lengths[..., None], self.positions),
            next_place=place,
        )

    @property
    def capacity(self) -> int | None:
        return None
