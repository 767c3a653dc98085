"""Rows of a cache: repeated for outputs of one prompt, gathered for beams, cut out and put back."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache import KVCache
from fusedkv_jax.cache.shardings import constrain_cache


def take_rows(cache: KVCache, rows: Int[Array, "R"]) -> KVCache:
    """The cache whose row i is row `rows[i]` of this one.

    Streams are stored as [P, B, ...], what belongs to a row alone (its length) as [B].
    """
    return constrain_cache(
        jax.tree.map(lambda leaf: leaf[rows] if leaf.ndim == 1 else leaf[:, rows], cache)
    )


@functools.partial(jax.jit, donate_argnums=())
def repeat_rows(
    cache: KVCache, logits: Float[Array, "B V"] | None, rows: Int[Array, "R"]
) -> tuple[KVCache, Float[Array, "R V"] | None]:
    """`take_rows` of a cache, and the logits that follow it, as a program of its own."""
    return take_rows(cache, rows), None if logits is None else logits[rows]


def cut_row(cache: KVCache, row: Int[Array, ""]) -> KVCache:
    """One row of a cache, as a cache of one."""

    def cut(leaf: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(leaf, row, 1, min(leaf.ndim - 1, 1))

    return constrain_cache(jax.tree.map(cut, cache))


def put_row(cache: KVCache, row: Int[Array, ""], new: KVCache) -> KVCache:
    """The cache with a row in place of another; in place where it is donated."""

    def put(leaf: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(leaf, part, row, min(leaf.ndim - 1, 1))

    return constrain_cache(jax.tree.map(put, cache, new))
