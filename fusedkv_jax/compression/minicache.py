"""MiniCache: adjacent layers share the directions of their keys and values, and keep norms."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fusedkv_jax.cache import KVCache, Store
from fusedkv_jax.cache.calls import Call
from fusedkv_jax.cache.plan import Group
from fusedkv_jax.cache.storage import Slot, Storage, encode, select, write
from fusedkv_jax.cache.stores import LinearStore, storage_of
from fusedkv_jax.compression.compressor import (
    Chunk,
    CompressionError,
    Compressor,
    Observed,
    check_flags,
)
from fusedkv_jax.compression.merging import merge, restore
from fusedkv_jax.compression.token_sets import merged, storages
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind, KVLayout
from fusedkv_jax.model import Decoder
from fusedkv_jax.trees import Leaf
from pallas_kernels import Quantized


@dataclass(frozen=True)
class MiniCache(Compressor):
    """Merge the caches of adjacent layers in the upper part of the model (arXiv 2405.14366).

    Layers are merged in pairs from `start` on. A pair keeps one direction per token, interpolated
    on the sphere, and both norms; the prompt's tokens whose directions differ most stay exact.

    What is generated is merged, however short the prompt.

    Attributes:
        budget: tokens of a prompt that are kept exactly; below 1 a share of the prompt.
        share: of the upper layer in the interpolation, t.
        start: first layer that is merged; half of the layers by default.
        per_head: merge every head by itself instead of the whole width.

    Raises:
        CompressionError: a field is out of range.
    """

    budget: float = 0.05
    share: float = 0.6
    start: int | None = None
    per_head: bool = False

    title: ClassVar[str] = "MiniCache"
    rewinds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        whole = type(self.budget) is int and self.budget >= 1
        if not whole and not (type(self.budget) is float and 0 < self.budget < 1):
            raise CompressionError(
                f"MiniCache: budget={self.budget!r}; use a whole number of tokens, or a share"
                " between 0 and 1"
            )
        if type(self.share) not in (int, float) or not 0 <= self.share <= 1:
            raise CompressionError(f"MiniCache: share={self.share!r}; use 0 to 1")
        if self.start is not None and (type(self.start) is not int or self.start < 0):
            raise CompressionError(f"MiniCache: start={self.start!r}; use a layer, or None")
        check_flags(self, "per_head")

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        layout = config.kv_layout
        for i in range(layout.num_layers):
            if any(layout.readers(kind, i) != (i,) for kind in KINDS):
                raise CompressionError(
                    f"MiniCache merges layers that each read a cache of their own, but layer {i}"
                    " shares its keys or values with other layers already; use a layout without"
                    " sharing, such as mha"
                )
        if not self.pairs(layout):
            raise CompressionError(
                f"MiniCache: start={self.start} leaves no two adjacent layers with full-length"
                f" caches among {layout.num_layers} layers; lower start"
            )

    def pairs(self, layout: KVLayout) -> tuple[int, ...]:
        """The lower layer of every pair."""
        full = [layout.stored_window("key", i) is None for i in range(layout.num_layers)]
        start = layout.num_layers // 2 if self.start is None else self.start
        return tuple(i for i in range(start, layout.num_layers - 1, 2) if full[i] and full[i + 1])

    def compress(
        self, model: Decoder, chunk: Chunk, cache: KVCache, observed: Observed
    ) -> tuple[Float[Array, "B V"], KVCache]:
        logits, cache = super().compress(model, chunk, cache, observed)
        exact = math.ceil(self.budget * chunk.length) if self.budget < 1 else int(self.budget)
        exact = min(exact, chunk.length)  # merged even so: a row is to depend on no longer one
        layout = model.config.kv_layout
        merging = tuple(i + one for i in self.pairs(layout) for one in (0, 1))
        full = next(group for group in cache.plan.groups if group.window is None)
        rest = tuple(i for i in full.keys if i not in merging)
        groups = [Group(None, merging, merging)]
        stores: list[Store] = [self._merge(cache, groups[0], exact)]
        if rest:
            groups.append(Group(None, rest, rest))
            found = storages(cache, groups[1])
            stores.append(LinearStore(found["key"], found["value"]))
        return logits, merged(cache, groups, stores)

    def _merge(self, cache: KVCache, group: Group, exact: int) -> MergedStore:
        lengths = cache.lengths
        wanted = jnp.full_like(lengths, exact)
        if self.budget < 1:
            # Less than a token off, as 0.05 * 20 in float32 may be a little more than 1.
            wanted = jnp.ceil(self.budget * lengths.astype(jnp.float32) - 1e-4).astype(jnp.int32)
        absent = jnp.arange(exact) >= jnp.minimum(wanted, lengths)[:, None]
        fields = {}
        for kind, storage in storages(cache, group).items():
            tokens = _plain(storage)
            heads = tokens.shape[3] if self.per_head else 1
            direction, norms, distance = merge(tokens[0::2], tokens[1::2], self.share, heads)
            present = jnp.arange(tokens.shape[2]) < lengths[:, None]
            distance = jnp.where(present, distance.mean(-1), -1.0)
            place = jax.lax.top_k(distance, exact)[1]  # [P / 2, B, E]
            both = jnp.repeat(place, 2, axis=0)[..., None, None]
            kept = jnp.take_along_axis(tokens, both, axis=2)
            place = jnp.where(absent, tokens.shape[2], place).astype(jnp.int32)
            for name, array in (
                ("", _encoded(direction, storage)),
                ("norm_", norms),
                ("exact_", _encoded(kept, storage)),
                ("place_", place),
            ):
                fields[f"{name}{kind}s"] = array
        return MergedStore(**fields, share=self.share)


def _encoded(tokens: Float[Array, "P B T K H"], storage: Storage) -> Storage:
    return jax.vmap(lambda stream: encode(stream, storage))(tokens)


def _plain(storage: Storage) -> Float[Array, "*P B S K H"]:
    return storage.dequantize() if isinstance(storage, Quantized) else storage


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "keys", "values", "norm_keys", "norm_values", "exact_keys", "exact_values",
        "place_keys", "place_values",
    ],
    meta_fields=["share"],
)  # fmt: skip
@dataclass(frozen=True)
class MergedStore(Store):
    """Pairs of layers: slots 2i and 2i + 1 share directions. Generated tokens are merged as well.

    Attributes:
        keys: directions, storage [P / 2, B, S, K, H].
        values: directions [P / 2, B, S, K, H'].
        norm_keys: float32 [P, B, S, R], R parts of a token.
        norm_values: float32 [P, B, S, R].
        exact_keys: tokens as they were, storage [P, B, E, K, H].
        exact_values: [P, B, E, K, H'].
        place_keys: slots of the exact keys, int32 [P / 2, B, E]; S where there is none.
        place_values: slots of the exact values.
        share: of the upper layer in the interpolation.
    """

    keys: Storage
    values: Storage
    norm_keys: Leaf
    norm_values: Leaf
    exact_keys: Storage
    exact_values: Storage
    place_keys: Leaf
    place_values: Leaf
    share: float

    def writes_at_end(self, call: Call) -> bool:
        return True  # both layers of a pair are needed

    def view(
        self, kind: Kind, slot: Slot, new: Float[Array, "B T K H"] | None, call: Call
    ) -> Float[Array, "B S K H"]:
        assert new is not None
        direction = _plain(select(storage_of(self, kind), slot // 2)).astype(jnp.float32)
        tokens = restore(direction, select(storage_of(self, kind, "norm_"), slot))
        exact = _plain(select(storage_of(self, kind, "exact_"), slot)).astype(jnp.float32)
        place = select(storage_of(self, kind, "place_"), slot // 2)
        rows = jnp.arange(place.shape[0])[:, None]
        tokens = tokens.at[rows, place].set(exact, mode="drop").astype(new.dtype)
        return write(tokens[None], 0, new, call.first, call.count)[0]

    def finish(self, new: dict[Kind, Float[Array, "P B T K H"]], call: Call) -> MergedStore:
        store = self
        for kind, tokens in new.items():
            storage, norms = storage_of(self, kind), storage_of(self, kind, "norm_")
            direction, sizes, _ = merge(tokens[0::2], tokens[1::2], self.share, norms.shape[-1])
            storage = _extended(storage, _encoded(direction, storage), call)
            norms = _extended(norms, sizes, call)
            store = store._with(kind, storage)._with(kind, norms, "norm_")
        return store


def _extended(storage: Storage, new: Storage, call: Call) -> Storage:
    """All streams of a storage with the call's tokens at their positions."""

    def put(stream: Storage, part: Storage) -> Storage:
        whole = jax.tree.map(lambda x: x[None], stream)
        return jax.tree.map(lambda x: x[0], write(whole, 0, part, call.first, call.count))

    return jax.vmap(put)(storage, new)
