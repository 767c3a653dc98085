"""The key/value cache: a pytree of stores, allocated only for the streams that are cached.

Keys are stored after their norm and rotation. With multi-head latent attention "keys" hold the
rotary key and "values" the latent.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from fusedkv_jax.cache import kivi, stacked
from fusedkv_jax.cache.plan import CachePlan, Group, StreamName, cache_plan
from fusedkv_jax.cache.storage import Storage, empty, storage_type
from fusedkv_jax.cache.stores import LinearStore, RingStore, Store, storage_of
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind
from fusedkv_jax.trees import Leaf

LOST = 1 << 30  # the length of a row that was given what it cannot hold: beyond any store


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["stores", "lengths"], meta_fields=["plan"]
)
@dataclass(frozen=True)
class KVCache:
    """Cached streams of a batch, one store for each group of the plan.

    Attributes:
        stores: where the groups' tokens are.
        lengths: tokens seen by each row so far, which is the next token's position; [B] int32.
            A compressed store holds fewer.
        plan: which streams are where.
    """

    stores: tuple[Store, ...]
    lengths: Leaf
    plan: CachePlan

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        *,
        batch_size: int,
        max_length: int,
        dtype: DTypeLike | None = None,
    ) -> KVCache:
        """Allocate an empty cache.

        Args:
            config: the model's configuration.
            batch_size: rows B.
            max_length: tokens a row can hold, prompt and generated together.
            dtype: storage type, by default the model's activation type: `float32`, `bfloat16`,
                `float16`; `int8`, `float8_e4m3fn`, `float8_e5m2` with a scale for each token and
                head; `int4` as KIVI has it, which leaves the newest 128 tokens and windowed
                streams exact.

        Raises:
            ValueError: a size below 1, an unknown dtype, or one that the model cannot have.
        """
        for name, size in (("batch_size", batch_size), ("max_length", max_length)):
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
                raise ValueError(f"{name}={size!r}; use a whole number of at least 1")
        if not isinstance(config, ModelConfig):
            raise ValueError(f"config is a {type(config).__name__}; use model.config")
        chosen = storage_type(config.dtype if dtype is None else dtype)
        if chosen == "int4":
            check_int4(config)
        plan = cache_plan(config.kv_layout)
        stores = tuple(_store(config, g, batch_size, max_length, chosen) for g in plan.groups)
        return cls(stores, jnp.zeros(batch_size, jnp.int32), plan)

    @property
    def keys(self) -> tuple[Storage, ...]:
        """Storage [P, B, S, K, H] of each group's keys; [P, B, S, K * H] in a `StackedStore`."""
        return tuple(storage_of(store, "key") for store in self.stores)

    @property
    def values(self) -> tuple[Storage, ...]:
        """Storage [P, B, S, K, H'] of each group's values, likewise."""
        return tuple(storage_of(store, "value") for store in self.stores)

    @property
    def capacity(self) -> int | None:
        """Tokens that a row can be given in all; None where windows forget as many as come."""
        limits = [store.capacity for store in self.stores]
        return min((limit for limit in limits if limit is not None), default=None)

    def overflows(self, lengths: Int[Array, "B"]) -> Bool[Array, "B"]:
        """Rows in which so many tokens are too many."""
        return functools.reduce(operator.or_, (store.overflows(lengths) for store in self.stores))

    @property
    def overflowed(self) -> Bool[Array, "B"]:
        """Rows whose logits are NaN, as they were given what they cannot hold.

        That is more tokens than there is room for (those beyond are dropped), a number of tokens
        below 0 or above the columns of the call, or an id outside the vocabulary.
        """
        # Of a lost row a compressor may have dropped so many tokens that the rest would fit.
        return self.overflows(self.lengths) | (self.lengths >= LOST)

    def advanced(self, valid: Bool[Array, "B"]) -> KVCache:
        """The cache after a call in which the rows that are not `valid` are lost."""
        return dataclasses.replace(self, lengths=jnp.where(valid, self.lengths, LOST))

    def check(self, config: ModelConfig, batch_size: int) -> None:
        """Raises ValueError where a model of `config` cannot use the cache.

        What is compared is known while tracing: the streams, their shapes and the rows.
        """
        self.check_present()
        layout = config.kv_layout
        streams: set[StreamName] = {(kind, i) for kind in KINDS for i in layout.cached(kind)}
        remedy = "create it with KVCache.create(model.config, ...)"
        if set(self.plan.places) != streams:
            raise ValueError(
                f"cache holds {self._described(self.plan.places)}, but the model's layout caches"
                f" {self._described(streams)}; {remedy}"
            )
        for store in self.stores:
            for kind in KINDS:
                found = store.token_shape(kind)
                if found != config.stream_shapes[kind]:
                    raise ValueError(
                        f"cache holds {kind}s of (heads, channels) {found}, but the model's"
                        f" are {config.stream_shapes[kind]}; {remedy}"
                    )
        if self.lengths.shape[0] != batch_size:
            raise ValueError(
                f"cache has batch_size={self.lengths.shape[0]} but tokens has {batch_size} rows;"
                " use as many"
            )

    def check_present(self) -> None:
        """Raises ValueError where the arrays were given away to an earlier call."""
        lengths = self.lengths
        if isinstance(lengths, jax.Array) and not isinstance(lengths, Tracer):
            if lengths.is_deleted():
                raise ValueError(
                    "cache was donated to an earlier call, which has used its memory; use the cache"
                    " that the call returned"
                )

    @staticmethod
    def _described(streams: Iterable[StreamName]) -> str:
        layers = {kind: sorted(i for k, i in streams if k == kind) for kind in KINDS}
        return f"keys of layers {layers['key']} and values of layers {layers['value']}"

    @property
    def nbytes(self) -> int:
        """Bytes of the cached streams, with their scales and whatever else a store keeps."""
        return sum(store.nbytes for store in self.stores)


def check_int4(config: ModelConfig) -> None:
    """Raises ValueError where a model's streams cannot be stored in 4 bits."""
    for kind in KINDS:
        kivi.channel_group(kind, config.stream_shapes[kind][1])
    layout = config.kv_layout
    for i, layer in enumerate(layout.layers):
        source = layout.attended("key", i)[0]
        if layer.window is not None and layout.stored_window("key", source) is None:
            raise ValueError(
                f"dtype='int4' does not serve layer {i}, whose window reads a stream that is kept"
                " in full for other layers; use int8"
            )


def unstacked(cache: KVCache) -> KVCache:
    """The cache with the heads of all streams apart, as compressors take it."""
    stores = tuple(s.apart() if isinstance(s, stacked.StackedStore) else s for s in cache.stores)
    return dataclasses.replace(cache, stores=stores)


def _store(config: ModelConfig, group: Group, rows: int, max_length: int, dtype: str) -> Store:
    ring = group.window is not None and group.window <= max_length
    length = group.window if ring and group.window else max_length

    def shape(kind: Kind, length: int) -> tuple[int, ...]:
        return (len(group.layers(kind)), rows, length, *config.stream_shapes[kind])

    if dtype == "int4":
        old = kivi.quantized_tokens(max_length)
        if group.window is None and old:
            codes = [kivi.empty_codes(kind, shape(kind, old)) for kind in KINDS]
            exact = [jnp.zeros(shape(kind, kivi.PLACES), config.dtype) for kind in KINDS]
            return kivi.KiviStore(codes[0], codes[1], exact[0], exact[1])
        dtype = config.dtype
    in_place = not ring and stacked.suits(config, dtype)
    length = stacked.whole_tiles(length, dtype) if in_place else length
    keys, values = (empty(shape(kind, length), dtype) for kind in KINDS)
    if ring:
        return RingStore(keys, values)
    store = LinearStore(keys, values)
    return stacked.StackedStore.of(store) if in_place else store
