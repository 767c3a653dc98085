"""How a cache lies on a mesh: rows over `data` and `fsdp`, KV heads over `tensor`.

Tokens are whole along `context`: a query of any row may read all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from fusedkv_jax.sharding import active_mesh, spec
from fusedkv_jax.trees import Leaf
from pallas_kernels import Quantized

Tree = TypeVar("Tree")
Write = Callable[..., Array]  # storage, slot, new tokens, their start and count

_STREAMS = (None, "batch", None, "kv_heads", None)  # of [P, B, S, K, H], codes and scales included
_GROUPS = (None, "batch", "kv_heads", None)  # of [P, pages, G, W], scales of pages


def cache_shardings(cache: PyTree, mesh: Mesh) -> PyTree:
    """A sharding for every array of a cache.

    Rows and KV heads that do not divide over the mesh are whole on every device, as are those of
    multi-head latent attention, whose one latent serves all heads.

    Args:
        cache: a `KVCache` of arrays or shapes, of any storage type or compressor.
        mesh: the mesh.

    Returns:
        The same tree with a `NamedSharding` in place of every array.
    """
    return _map(lambda leaf, heads: NamedSharding(mesh, _spec(leaf, mesh, heads)), cache)


def constrain_cache(cache: Tree) -> Tree:
    """Fix how a cache is split, under `jax.set_mesh`."""
    mesh = active_mesh()
    if mesh is None:
        return cache
    fix = jax.lax.with_sharding_constraint
    return _map(lambda leaf, heads: fix(leaf, _spec(leaf, mesh, heads)), cache)


def head_groups(heads: int) -> int:
    """Groups of KV heads that lie apart on the mesh that is set; 1 without one."""
    mesh = active_mesh()
    parts = 1 if mesh is None else mesh.shape["tensor"]
    return parts if heads % parts == 0 else 1


def _map(place: Callable[[Leaf, int | None], object], cache: PyTree) -> PyTree:
    """`place(array, heads)` for all arrays: heads where they share an array's last axis, and 0 for
    scales of pages, which have an axis for groups of heads."""

    def of_store(node: PyTree) -> PyTree:
        heads = getattr(node, "heads", None)

        def of_storage(storage: PyTree) -> PyTree:
            if heads is None or not isinstance(storage, Quantized):
                return jax.tree.map(lambda leaf: place(leaf, heads), storage)
            return Quantized(place(storage.data, heads), place(storage.scale, 0))

        return jax.tree.map(of_storage, node, is_leaf=lambda x: isinstance(x, Quantized))

    return jax.tree.map(of_store, cache, is_leaf=lambda node: hasattr(node, "heads"))


def local_rows(write: Write, heads: int | None = None) -> Write:
    """A write into storage of which every device does its own rows and heads.

    To XLA's partitioner a scatter into indexed rows needs all new tokens on every device.

    Args:
        write: takes storage [P, B, S, ...], a slot, new tokens [B, T, ...] and their start and
            count [B]; returns the storage.
        heads: how many share the storage's last axis; None if they have one of their own.
    """

    def run(array: Array, slot: ArrayLike, new: Array, start: Array, count: Array) -> Array:
        mesh = active_mesh()
        if mesh is None:
            return write(array, slot, new, start, count)
        storage = _spec(array, mesh, heads)
        own = storage[3:] if heads is None else storage[-1:]
        rows, tokens = P(storage[1]), P(storage[1], None, *own)
        specs = (storage, P(), tokens, rows, rows)
        local = jax.shard_map(write, mesh=mesh, in_specs=specs, out_specs=storage, check_vma=False)
        return local(array, jnp.asarray(slot), new, start, count)

    return run


def local_groups(write: Write) -> Write:
    """`local_rows` for the scales of pages, [P, pages, G, W], and new ones [1, N, K]."""

    def run(array: Array, slot: ArrayLike, new: Array, pages: Array, places: Array) -> Array:
        mesh = active_mesh()
        if mesh is None:
            return write(array, slot, new, pages, places)
        storage = _spec(array, mesh, 0)
        specs = (storage, P(), P(None, None, storage[2]), P(), P())
        local = jax.shard_map(write, mesh=mesh, in_specs=specs, out_specs=storage, check_vma=False)
        return local(array, jnp.asarray(slot), new, pages, places)

    return run


def _spec(leaf: Leaf, mesh: Mesh | AbstractMesh, heads: int | None = None) -> P:
    rank = len(leaf.shape)
    if heads == 0:
        return spec(_GROUPS, leaf.shape, mesh)
    if heads is not None:
        together = (None, "batch", *(None,) * (rank - 3), "kv_heads")  # of [P, B, *S, K * H]
        return spec(together, (*leaf.shape[:-1], heads), mesh)
    if rank == len(_STREAMS):
        axes = _STREAMS
    elif rank == 1:  # what belongs to a row alone
        axes = ("batch",)
    else:  # a compressor's notes on the tokens of a row
        axes = (None, "batch", *(None,) * (rank - 2))
    return spec(axes, leaf.shape, mesh)
