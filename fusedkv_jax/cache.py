"""The key/value cache: a pytree of arrays, allocated only for the streams that are cached.

Streams of one kind and one stored length share an array `[P, B, S, K, H]`: full-length streams have
S = max_length slots, streams that only windowed layers read are rings of S = min(W, max_length)
slots, in which the token at position p sits at slot p mod S. Keys are stored after their norm and
rotation. With multi-head latent attention "keys" hold the rotary key and "values" the latent.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind, KVLayout


@dataclass(frozen=True)
class CachePlan:
    """Where each cached stream lives: arrays grouped by stored length.

    Attributes:
        windows: stored length of each group of arrays; None for all tokens.
        places: (group, slot in the group's array) of every cached (kind, layer).
        sizes: number of slots P of every (kind, group).
    """

    windows: tuple[int | None, ...]
    places: dict[tuple[Kind, int], tuple[int, int]]
    sizes: dict[tuple[Kind, int], int]

    def is_ring(self, kind: Kind, layer: int) -> bool:
        """The stream keeps the last W tokens only."""
        return self.windows[self.places[kind, layer][0]] is not None


@functools.lru_cache(maxsize=256)
def cache_plan(layout: KVLayout) -> CachePlan:
    """Derive the cache's arrays from a layout."""
    streams: list[tuple[Kind, int]] = [(kind, i) for kind in KINDS for i in layout.cached(kind)]
    stored = {(kind, i): layout.stored_window(kind, i) for kind, i in streams}
    windows = tuple(sorted(set(stored.values()), key=lambda w: (w is not None, w)))
    sizes: dict[tuple[Kind, int], int] = dict.fromkeys(
        ((kind, group) for kind in KINDS for group in range(len(windows))), 0
    )
    places: dict[tuple[Kind, int], tuple[int, int]] = {}
    for kind, i in streams:
        group = windows.index(stored[kind, i])
        places[kind, i] = (group, sizes[kind, group])
        sizes[kind, group] += 1
    return CachePlan(windows, places, sizes)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["keys", "values", "lengths"], meta_fields=[]
)
@dataclass(frozen=True)
class KVCache:
    """Cached streams of a batch, one array per group of `CachePlan.windows`.

    Attributes:
        keys: arrays [P, B, S, K, H], None for a group without keys.
        values: arrays [P, B, S, K, H'], None for a group without values.
        lengths: tokens seen by each row so far, which is the next token's position; [B] int32.
    """

    # Not typed as arrays: a pytree is also rebuilt around specifications and masks.
    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    lengths: Any

    @classmethod
    def create(
        cls, config: ModelConfig, *, batch_size: int, max_length: int, dtype: Any = None
    ) -> KVCache:
        """Allocate an empty cache.

        Args:
            config: the model's configuration.
            batch_size: rows B.
            max_length: tokens a row can hold, prompt and generated together.
            dtype: storage type, by default the model's activation type.

        Raises:
            ValueError: a size below 1.
        """
        for name, size in (("batch_size", batch_size), ("max_length", max_length)):
            if size < 1:
                raise ValueError(f"{name}={size}; use at least 1")
        plan = cache_plan(config.kv_layout)
        dtype = jnp.dtype(config.dtype if dtype is None else dtype)

        def group(kind: Kind, index: int) -> Array | None:
            slots = plan.sizes[kind, index]
            length = min(plan.windows[index] or max_length, max_length)
            shape = (slots, batch_size, length, *config.stream_shapes[kind])
            return jnp.zeros(shape, dtype) if slots else None

        keys, values = (
            tuple(group(kind, index) for index in range(len(plan.windows))) for kind in KINDS
        )
        return cls(keys, values, jnp.zeros(batch_size, jnp.int32))

    @property
    def nbytes(self) -> int:
        """Bytes of the cached streams."""
        return sum(x.nbytes for x in jax.tree.leaves((self.keys, self.values)))


def write(
    array: Float[Array, "P B S K H"],
    slot: int | np.integer | Int[Array, ""],
    new: Float[Array, "B T K H"],
    start: Int[Array, "B"],
    count: Int[Array, "B"],
) -> Float[Array, "P B S K H"]:
    """Put each row's first `count` new tokens at positions `start`, ... of one full-length stream.

    Nothing else is touched: padding beyond `count`, and tokens beyond S, are dropped.
    """
    length = array.shape[2]
    if new.shape[1] == 1:
        rows = jnp.arange(array.shape[1])
        position = jnp.where(count > 0, start, length)  # out of bounds: dropped
        return array.at[slot, rows, position].set(new[:, 0].astype(array.dtype), mode="drop")
    old = jax.lax.dynamic_index_in_dim(array, slot, keepdims=False)
    source = jnp.arange(length) - start[:, None]  # [B, S] token that lands in each slot
    updated = _select(source, (source >= 0) & (source < count[:, None]), new, old)
    return jax.lax.dynamic_update_index_in_dim(array, updated, slot, 0)


def ring_positions(start: Int[Array, "B"], slots: int) -> Int[Array, "B S"]:
    """Position held by each slot of a ring that has seen `start` tokens; negative if none.

    For example 5 tokens in 4 slots: slots hold positions 4, 1, 2, 3.
    """
    last = start[:, None] - 1
    return last - (last - jnp.arange(slots)) % slots


def write_ring(
    ring: Float[Array, "B S K H"],
    new: Float[Array, "B T K H"],
    start: Int[Array, "B"],
    count: Int[Array, "B"],
) -> Float[Array, "B S K H"]:
    """The ring after each row's first `count` new tokens, the first of them at position `start`."""
    position = ring_positions(start + count, ring.shape[1])
    source = position - start[:, None]
    return _select(source, source >= 0, new, ring)


def _select(
    source: Int[Array, "B S"],
    is_new: Bool[Array, "B S"],
    new: Float[Array, "B T K H"],
    old: Float[Array, "B S K H"],
) -> Float[Array, "B S K H"]:
    index = jnp.clip(source, 0, new.shape[1] - 1)[:, :, None, None]
    gathered = jnp.take_along_axis(new.astype(old.dtype), index, axis=1)
    return jnp.where(is_new[:, :, None, None], gathered, old)
