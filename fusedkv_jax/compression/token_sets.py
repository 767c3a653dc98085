"""Which cached streams choose their tokens together, and caches with fewer tokens.

Streams that some layer reads together keep one set of tokens, chosen by the mean score of all
layers that read any of them; FusedKV's layers 0 and mid and all upper layers, for example.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache import CachePlan, KVCache, Store
from fusedkv_jax.cache.calls import Reading, Source
from fusedkv_jax.cache.plan import Group, split_plan
from fusedkv_jax.cache.storage import Storage, Tree, take_tokens
from fusedkv_jax.cache.stores import LinearStore, storage_of
from fusedkv_jax.layouts import KINDS, Kind, KVLayout
from fusedkv_jax.model.mixing import mix
from pallas_kernels import Quantized

Index = Int[Array, "*P B K C"]


def token_sets(layout: KVLayout) -> tuple[Group, ...]:
    """Groups of full-length streams that keep the same tokens, the one of the lowest layer first.

    Streams that only windowed layers read are left as they are.
    """
    groups = [group for group in split_plan(layout).groups if group.window is None]
    return tuple(sorted(groups, key=lambda group: min(group.keys + group.values)))


def readers(layout: KVLayout, group: Group) -> tuple[int, ...]:
    """Layers whose attention reads the group's streams."""
    return tuple(i for i in range(layout.num_layers) if layout.attended("key", i)[0] in group.keys)


def refuse_windows(title: str, layout: KVLayout, error: type[ValueError]) -> None:
    """Raises where a windowed layer reads a stream that full layers read as well."""
    for group in token_sets(layout):
        for i in readers(layout, group):
            if (window := layout.layers[i].window) is not None:
                raise error(
                    f"{title}: layer {i} reads the last {window} tokens of streams that other"
                    " layers read in full, and cannot tell them once tokens are missing; use a"
                    " layout in which windowed layers have streams of their own"
                )


def read_keys(reading: Reading) -> Float[Array, "B S K H"]:
    """The keys that a layer has just read, dequantized and fused."""
    sources = [_numbers(source, reading.q.dtype) for source in reading.pieces[0].keys]
    weights = reading.weights["key"]
    return sources[0] if weights is None else mix(weights, sources)


def _numbers(source: Source, dtype: DTypeLike) -> Float[Array, "B S K H"]:
    if isinstance(source, Quantized):
        return source.dequantize(dtype)
    assert isinstance(source, Array)
    return source


def mean_scores(layout: KVLayout, group: Group, found: Sequence[Array]) -> Float[Array, "B K S"]:
    """The group's score: the mean over the layers that read it."""
    return jnp.stack([found[i] for i in readers(layout, group)]).mean(0)


def merged(cache: KVCache, groups: Sequence[Group], stores: Sequence[Store]) -> KVCache:
    """The cache with all full-length streams held by other stores, rings as they are."""
    kept = [
        (group, store)
        for group, store in zip(cache.plan.groups, cache.stores, strict=True)
        if group.window is not None
    ]
    plan = CachePlan((*groups, *(group for group, _ in kept)))
    return KVCache((*stores, *(store for _, store in kept)), cache.lengths, plan)


def storages(cache: KVCache, group: Group) -> dict[Kind, Storage]:
    """The storage of a group's keys and values, from wherever the cache has them."""
    found = {}
    for kind in KINDS:
        places = [cache.plan.places[kind, i] for i in group.layers(kind)]
        storage = storage_of(cache.stores[places[0][0]], kind)
        slots = jnp.asarray([slot for _, slot in places], jnp.int32)
        whole = slots.shape[0] == storage.shape[0]
        found[kind] = storage if whole else jax.tree.map(lambda x, at=slots: x[at], storage)
    return found


def lengthened(storage: Tree, extra: int) -> Tree:
    """A storage with `extra` empty tokens at its end."""

    def pad(array: Array) -> Array:
        return jnp.pad(array, ((0, 0), (0, 0), (0, extra), *((0, 0),) * (array.ndim - 3)))

    return jax.tree.map(pad, storage)


def retain(
    cache: KVCache, group: Group, index: Index | dict[Kind, Index], room: int
) -> LinearStore:
    """A store of the named tokens of a group's streams, with room for more.

    Args:
        cache: all tokens.
        group: the streams.
        index: int32 tokens to keep; per kind [P, B, K, C] or [B, K, C] for all streams.
        room: empty slots after them.
    """
    index = index if isinstance(index, dict) else dict.fromkeys(KINDS, index)
    found = storages(cache, group)
    keys, values = (lengthened(take_tokens(found[kind], index[kind]), room) for kind in KINDS)
    budget = index["key"].shape[-1]
    return LinearStore(keys, values, jnp.maximum(cache.lengths - budget, 0))
