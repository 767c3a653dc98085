"""A store in pages: tokens of many requests in one pool, found by the table of each.

Pages belong to nobody here: who holds which is decided on the host (`fusedkv_jax.serving`), and a
call brings the tables. Requests share pages by naming the same ones.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from fusedkv_jax.cache.calls import Call, Cut, Piece, Rows, View
from fusedkv_jax.cache.shardings import constrain_cache, head_groups, local_groups, local_rows
from fusedkv_jax.cache.stacked import LANES
from fusedkv_jax.cache.storage import Slot, Storage, Tree, empty, encode, storage_type
from fusedkv_jax.cache.stores import Store, storage_of
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind
from fusedkv_jax.trees import Leaf
from pallas_kernels import PagedStream, Quantized, choice

_TILE = 16  # tokens of a tile of codes on a TPU, see `_empty_pool`


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["table", "positions"], meta_fields=[]
)
@dataclass(frozen=True)
class Lane:
    """Rows of one width, among tokens that are projected together.

    Attributes:
        table: int32 pages of each row, [R, W]; entries that no position reaches may be anything.
        positions: int32 [R, T], going up by one in each row; -1 for padding, at its end.
    """

    table: Leaf | np.ndarray
    positions: Leaf | np.ndarray

    @property
    def lengths(self) -> Int[Array, "R"]:
        """Tokens up to the last of each row."""
        return jnp.max(self.positions, axis=1) + 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["first", "count", "segment_ids", "lanes"],
    meta_fields=["length"],
)
@dataclass(frozen=True)
class PagedCall(Call):
    """New tokens of many requests side by side, as one row [1, N]: those of lane after lane.

    Several rows may name the same pages: a long chunk is a few rows, which read what all of them
    write.
    """

    lanes: tuple[Lane, ...] = ()

    @classmethod
    def of(cls, lanes: tuple[Lane, ...]) -> PagedCall:
        """The call of some lanes."""
        length = sum(lane.positions.size for lane in lanes)
        count: Any = np.full(1, length, np.int32)  # known while tracing
        return cls(None, count, length, None, lanes)

    @property
    def positions(self) -> Int[Array, "1 N"]:
        """Positions of the new tokens; 0 for padding."""
        return jnp.maximum(self._flat, 0)[None]

    @property
    def valid_positions(self) -> Int[Array, "1 N"]:
        return self._flat[None]

    def take(self, index: Int[Array, "R T"]) -> PagedCall:
        """Some of the tokens: rows of one request's each, padded with -1 at their end."""
        tables = jnp.concatenate([lane.table for lane in self.lanes])
        widths = [lane.positions.shape for lane in self.lanes]
        rows = np.repeat(np.arange(len(tables)), np.repeat(*np.array(widths).T[::-1]))
        table = tables[jnp.asarray(rows)[index[:, 0]]]
        positions = jnp.where(index < 0, -1, self._flat[index])
        return PagedCall.of((Lane(table, positions),))

    def places(self, page_size: int, num_pages: int) -> tuple[Array, Array]:
        """Page and place in it of each token, [N]; padding has a page that is not there."""
        pages = []
        for lane in self.lanes:
            index = jnp.maximum(lane.positions, 0) // page_size
            page = jnp.take_along_axis(lane.table, index, axis=1, mode="clip")
            pages.append(jnp.where(lane.positions < 0, num_pages, page).ravel())
        return jnp.concatenate(pages), self.positions[0] % page_size

    @property
    def _flat(self) -> Int[Array, "N"]:
        return jnp.concatenate([lane.positions.ravel() for lane in self.lanes])


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=["heads"]
)
@dataclass(frozen=True)
class PagedStore(Store):
    """All cached streams of a model in pages of one pool; calls are `PagedCall`s.

    Windowed streams are kept whole.

    Attributes:
        keys: storage [P, pages, page_size, K * H]; 8-bit codes, which may lie in tiles of some
            tokens, [P, pages, tiles, tokens, K * H], have scales [P, pages, G, W]. Both are those
            of `pallas_kernels.PagedStream`.
        values: storage [P, pages, page_size, K * H'], likewise.
        heads: K; 1 for latents and their rotary keys.
    """

    keys: Storage
    values: Storage
    heads: int

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        *,
        num_pages: int,
        page_size: int,
        dtype: DTypeLike | None = None,
    ) -> PagedStore:
        """An empty pool.

        Args:
            config: the model's configuration.
            num_pages: pages, each of all cached streams.
            page_size: tokens of a page.
            dtype: storage type, as `KVCache.create` has them; `int4` is not served.

        Raises:
            ValueError: a model or a storage type that cannot be paged.
        """
        chosen = storage_type(config.dtype if dtype is None else dtype)
        check_paged(config, chosen)
        layout = config.kv_layout
        shapes = (
            (len(layers), num_pages, page_size, *config.stream_shapes[kind])
            for kind, layers in zip(KINDS, (layout.cached_keys, layout.cached_values), strict=True)
        )
        keys, values = (_empty_pool(shape, chosen) for shape in shapes)
        return cls(keys, values, config.stream_shapes["key"][0])

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.keys.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return math.prod(self.keys.shape[2:-1])

    def write(self, kind: Kind, slot: Slot, new: Float[Array, "1 N K H"], call: Call) -> PagedStore:
        assert isinstance(call, PagedCall)
        storage = storage_of(self, kind)
        where = call.places(self.page_size, self.num_pages)

        put, put_scales = local_rows(_put, self.heads), local_groups(_put_scales)
        encoded = _together(encode(new, storage), 2)
        if not isinstance(storage, Quantized):
            return self._with(kind, put(storage, slot, encoded, *where))
        assert isinstance(encoded, Quantized)
        data = put(storage.data, slot, encoded.data, *where)
        scale = put_scales(storage.scale, slot, encoded.scale, *where)
        return self._with(kind, Quantized(data, scale))

    def view(self, kind: Kind, slot: Slot, new: Array | None, call: Call) -> Int[Array, ""]:
        # Not the pool: held from before a layer writes, it would have to be copied.
        return jnp.asarray(slot, jnp.int32)

    def pieces(
        self,
        keys: tuple[View, ...],
        values: tuple[View, ...],
        q: Float[Array, "B t N H"],
        rows: Rows,
        call: Call,
    ) -> tuple[Piece, ...]:
        assert isinstance(call, PagedCall)
        pieces, start = [], 0
        for lane in call.lanes:
            mask = rows._replace(positions=lane.positions).mask() | {"kv_lengths": lane.lengths}
            own_keys, own_values = (
                tuple(self._stream(storage, slot, lane.table) for slot in slots)
                for storage, slots in ((self.keys, keys), (self.values, values))
            )
            cut = Cut(start, *lane.positions.shape)
            pieces.append(Piece(own_keys, own_values, mask, cut=cut))
            start += lane.positions.size
        return tuple(pieces)

    def token_shape(self, kind: Kind) -> tuple[int, int]:
        storage = storage_of(self, kind)
        return (self.heads, storage.shape[-1] // self.heads)

    @property
    def capacity(self) -> int | None:
        return self.num_pages * self.page_size

    def _stream(self, storage: Storage, slot: Slot, table: Array | np.ndarray) -> PagedStream:
        data, scale = storage, None
        if isinstance(storage, Quantized):
            data, scale = storage.data, storage.scale
        return PagedStream(data, slot, table, data.shape[-1] // self.heads, scale)


def check_paged(config: ModelConfig, dtype: str) -> None:
    """Raises ValueError where a model's cache cannot lie in pages."""
    remedy = "let each row be in one piece: a KVCache, or slots of an engine"
    if config.kv_layout.is_cyclic:
        raise ValueError(
            f"layout {config.kv_layout.spec or 'of the model'!r} is cyclic: what it computes"
            f" depends on where a prompt is cut, so it is not served from pages; {remedy}"
        )
    if dtype == "int4":
        raise ValueError("dtype='int4' keeps recent tokens apart, which pages do not; use int8")


def page_bytes(config: ModelConfig, page_size: int, dtype: DTypeLike | None = None) -> int:
    """Bytes of a page of `PagedStore.create`, what fills up lanes included."""
    one = functools.partial(PagedStore.create, config, num_pages=1, page_size=page_size)
    leaves = jax.tree.leaves(jax.eval_shape(lambda: one(dtype=dtype)))
    return sum(x.size * x.dtype.itemsize for x in leaves)


def copy_pages(
    store: PagedStore, sources: Int[Array, "n"], targets: Int[Array, "n"], count: Int[Array, ""]
) -> PagedStore:
    """The pool after the first `count` of some copies from page to page, one after the other."""

    def copy(i: Array, pools: list[Array]) -> list[Array]:
        return [
            jax.lax.dynamic_update_slice_in_dim(
                pool, jax.lax.dynamic_slice_in_dim(pool, sources[i], 1, axis=1), targets[i], axis=1
            )
            for pool in pools
        ]

    leaves, tree = jax.tree.flatten(store)
    return constrain_cache(jax.tree.unflatten(tree, jax.lax.fori_loop(0, count, copy, leaves)))


def take_pages(store: PagedStore, pages: Int[Array, "n"]) -> PagedStore:
    """Some pages, as a small pool."""
    return jax.tree.map(lambda pool: pool[:, pages], store)


def put_pages(store: PagedStore, pages: Int[Array, "n"], new: PagedStore) -> PagedStore:
    """The pool with a small pool's pages at some places; a page that is not there drops them."""
    put = jax.tree.map(lambda pool, part: pool.at[:, pages].set(part, mode="drop"), store, new)
    return constrain_cache(put)


def _put(
    pool: Shaped[Array, "P pages *S W"],
    slot: Slot,
    new: Shaped[Array, "1 N W"],
    pages: Int[Array, "N"],
    places: Int[Array, "N"],
) -> Shaped[Array, "P pages *S W"]:
    token = (places,) if pool.ndim == 4 else jnp.divmod(places, pool.shape[3])
    return pool.at[slot, pages, *token].set(new[0], mode="drop")


def _put_scales(
    pool: Shaped[Array, "P pages G W"],
    slot: Slot,
    new: Shaped[Array, "1 N K"],
    pages: Int[Array, "N"],
    places: Int[Array, "N"],
) -> Shaped[Array, "P pages G W"]:
    """Scales of new tokens.

    By numbers of a flat pool: TPUs would write a few lanes of a longer axis in a loop over tokens.
    """
    _, num_pages, groups, width = pool.shape
    heads = new.shape[2] // groups
    row = (jnp.asarray(slot) * num_pages + pages)[:, None] * groups + jnp.arange(groups)
    place = row[..., None] * width + places[:, None, None] * heads + jnp.arange(heads)  # [N, G, k]
    place = jnp.where((pages < num_pages)[:, None, None], place, pool.size)
    flat = pool.reshape(-1).at[place.reshape(-1)].set(new.reshape(-1), mode="drop")
    return flat.reshape(pool.shape)


def _empty_pool(shape: tuple[int, ...], dtype: str) -> Storage:
    """Pages of streams of this shape [P, pages, page_size, K, H].

    On a TPU XLA lays 32 rows of 8-bit codes out in one tile, but writes rows into tiles of 8: it
    would copy the whole pool before each write and after it. An axis of 16 rows lies in tiles of 8.
    """
    storage = _together(empty(shape, dtype), 3)
    if not isinstance(storage, Quantized):
        return storage
    data, (page_size, heads) = storage.data, shape[2:4]
    groups = head_groups(heads)
    width = page_size * heads // groups
    if choice.device()[0] == "tpu":
        width += -width % LANES  # turns round what does not fill lanes, and pads it there
        if page_size > _TILE and page_size % _TILE == 0:
            data = data.reshape(*shape[:2], page_size // _TILE, _TILE, -1)
    scale = jnp.zeros((*shape[:2], groups, width), storage.scale.dtype)
    return Quantized(data, scale)


def _together(storage: Tree, axis: int) -> Tree:
    """All axes from `axis` on as one: the heads of a token."""
    return jax.tree.map(lambda x: x.reshape(*x.shape[:axis], -1), storage)
