"""Storage of one kind of stream: plain arrays or 8-bit codes, and how tokens get into them.

A storage is an array `[P, B, S, K, H]`, or a `Quantized` whose arrays all begin with `[P, B]` and
have their tokens on the third axis. Everything here works array by array, which serves both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from fusedkv_jax.cache.shardings import local_rows
from fusedkv_jax.cache.storage_types import FLOATS, STORAGE_TYPES
from fusedkv_jax.validation import nearest
from pallas_kernels.quantized import Quantized, quantize
from pallas_kernels.stacked import Stacked

SCALE_TYPE = jnp.float32  # of 8-bit codes, one for each token and head
SCATTERED = 32  # up to so many new tokens are put in one by one, without passing over the stream

if TYPE_CHECKING:
    Storage = Array | Quantized
else:
    Storage = object  # see `fusedkv_jax.trees`

Slot = int | np.integer | Int[Array, ""]
Tree = TypeVar("Tree")
S = TypeVar("S", bound=Storage)


def storage_type(dtype: DTypeLike) -> str:
    """The name of a storage type.

    Raises:
        ValueError: a cache cannot be stored in `dtype`.
    """
    try:
        name, problem = jnp.dtype(dtype).name, "no storage type of caches"
    except TypeError:
        name, problem = str(dtype), "no dtype"
    if name in STORAGE_TYPES:
        return name
    names = ", ".join(STORAGE_TYPES)
    raise ValueError(f"dtype={dtype!r} is {problem}; use {names}{nearest(name, STORAGE_TYPES)}")


def empty(shape: tuple[int, ...], dtype: str) -> Storage:
    """An empty storage [P, B, S, K, H]."""
    if dtype in FLOATS:
        return jnp.zeros(shape, dtype)
    return Quantized(jnp.zeros(shape, dtype), jnp.zeros((*shape[:-1], 1), SCALE_TYPE))


def encode(new: Float[Array, "B T K H"], storage: Storage) -> Storage:
    """New tokens as the storage holds them."""
    if isinstance(storage, Quantized):
        return quantize(new, storage.data.dtype.name, scale_dtype=SCALE_TYPE)
    return new.astype(storage.dtype)


def select(storage: Tree, slot: Slot) -> Tree:
    """One stream, [B, S, K, H]."""
    return jax.tree.map(
        lambda array: jax.lax.dynamic_index_in_dim(array, slot, keepdims=False), storage
    )


def source_in_place(storage: Storage, slot: Slot) -> Stacked:
    """One stream where it lies, for attention in XLA to cut tiles out.

    A loop over tiles takes a stream that was cut out before as a copy, and makes it again for every
    token: at 16,384 tokens on two CPU cores half of a decoding step.
    """
    slot = jnp.asarray(slot, jnp.int32)
    data, scale = (
        (storage.data, storage.scale[..., 0]) if isinstance(storage, Quantized) else (storage, None)
    )
    return Stacked(data, slot, data.shape[-1], scale)


def take_tokens(storage: Tree, index: Int[Array, "*P B K C"]) -> Tree:
    """The named tokens of every KV head: a storage of C tokens, per-token codes included.

    Args:
        storage: all tokens, [P, B, S, K, H].
        index: tokens to take, for all streams or for each of the P streams apart.
    """
    index = jnp.swapaxes(index, -1, -2)[..., None]  # [*P, B, C, K, 1]
    return jax.tree.map(
        lambda array: jnp.take_along_axis(
            array, jnp.broadcast_to(index, (array.shape[0], *index.shape[-4:])), axis=2
        ),
        storage,
    )


def write(
    storage: S,
    slot: Slot,
    new: S,
    start: Int[Array, "B"],
    count: Int[Array, "B"],
    heads: int | None = None,
) -> S:
    """Put each row's first `count` new tokens at places `start`, ... of one stream.

    Nothing else is touched: padding beyond `count`, and tokens beyond S, are dropped.

    Args:
        storage: of all streams.
        slot: the stream.
        new: encoded tokens; groups of tokens that share a scale must be whole.
        start: place of the first new token in each row.
        count: number of tokens in each row.
        heads: how many share the last axis; None if they have one of their own.
    """
    length = storage.shape[2]

    def put(array: Array, part: Array) -> Array:
        group = length // array.shape[2]
        return local_rows(_write, heads)(array, slot, part, start // group, count // group)

    return jax.tree.map(put, storage, new)


def _write(
    array: Shaped[Array, "P B S *rest"],
    slot: Slot,
    new: Shaped[Array, "B T *rest"],
    start: Int[Array, "B"],
    count: Int[Array, "B"],
) -> Shaped[Array, "P B S *rest"]:
    length = array.shape[2]
    # Both ways update a donated array in place. A scatter touches the new places alone; many tokens
    # are one pass over the stream, without indices.
    if new.shape[1] <= SCATTERED:
        rows, steps = jnp.arange(array.shape[1])[:, None], jnp.arange(new.shape[1])
        beyond = steps >= count[:, None]
        place = jnp.where(beyond, length, start[:, None] + steps)  # out of bounds: dropped
        return array.at[slot, rows, place].set(new, mode="drop")
    old = jax.lax.dynamic_index_in_dim(array, slot, keepdims=False)
    source = jnp.arange(length) - start[:, None]  # [B, S] token that lands in each place
    updated = _select(source, (source >= 0) & (source < count[:, None]), new, old)
    return jax.lax.dynamic_update_index_in_dim(array, updated, slot, 0)


def ring_positions(start: Int[Array, "B"], slots: int) -> Int[Array, "B S"]:
    """Position held by each place of a ring that has seen `start` tokens; negative if none.

    For example 5 tokens in 4 places: they hold positions 4, 1, 2, 3.
    """
    last = start[:, None] - 1
    return last - (last - jnp.arange(slots)) % slots


def write_ring(
    ring: Storage, new: Storage, start: Int[Array, "B"], count: Int[Array, "B"]
) -> Storage:
    """The ring [B, S, K, H] after each row's first `count` new tokens, at positions `start`, ..."""

    def put(old: Array, part: Array) -> Array:
        position = ring_positions(start + count, old.shape[1])
        source = position - start[:, None]
        return _select(source, source >= 0, part, old)

    return jax.tree.map(put, ring, new)


def _select(
    source: Int[Array, "B S"],
    is_new: Bool[Array, "B S"],
    new: Shaped[Array, "B T *rest"],
    old: Shaped[Array, "B S *rest"],
) -> Shaped[Array, "B S *rest"]:
    wide = (..., *(None,) * (old.ndim - 2))
    index = jnp.clip(source, 0, new.shape[1] - 1)[wide]
    gathered = jnp.take_along_axis(new.astype(old.dtype), index, axis=1)
    return jnp.where(is_new[wide], gathered, old)
