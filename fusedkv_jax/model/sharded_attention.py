"""The attention operation on a mesh: every device attends with its rows, tokens and heads.

Inside `shard_map` the operation is local, so a kernel sees plain arrays. Keys and values whose
sequence is split over `context` are gathered there, and only there: they stay split between layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

import pallas_kernels
from fusedkv_jax.cache.calls import Source, StreamWeights
from fusedkv_jax.sharding import RULES, spec
from pallas_kernels import PagedStream, RaggedRows, Stacked, stacked

Sources = tuple[Source, ...]
Weights = tuple[StreamWeights, StreamWeights]

_IN_PLACE = (Stacked, PagedStream)  # sources that are parts of a larger array


def attention(
    q: Float[Array, "B T N H"],
    keys: Sources,
    values: Sources,
    key_weights: StreamWeights = None,
    value_weights: StreamWeights = None,
    *,
    return_residuals: bool = False,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """`pallas_kernels.attention`, split over the mesh that is set, if one is."""
    mesh, free = _free_axes()
    options |= {"return_residuals": return_residuals}
    if mesh is None:
        return pallas_kernels.attention(q, keys, values, key_weights, value_weights, **options)
    arrays = {name: options.pop(name) for name in _AXES if options.get(name) is not None}
    length, whole = q.shape[1], keys[0].shape[1]
    # A cache is whole on every device along `context`; the sequence that is trained on is split.
    split = "kv_lengths" not in arrays and "kv_positions" not in arrays and whole == length
    tokens = "sequence" if split and length % mesh.shape["context"] == 0 else None
    if tokens and mesh.shape["context"] > 1 and "q_positions" not in arrays:
        arrays["q_positions"] = jnp.broadcast_to(jnp.arange(length), q.shape[:2])
    # Queries that say where they are can be split even so: as many devices share a prompt.
    queries = "sequence" if "q_positions" in arrays else tokens
    heads, kv_heads = head_axes(q.shape[2], keys[0].shape[2], mesh.shape["tensor"])

    if heads is not None and kv_heads is None:
        keys, values = stacked.read(keys), stacked.read(values)  # each device cuts out its head

    part = functools.partial(_part, mesh, free)
    source = functools.partial(_source, part, tokens, kv_heads)
    q_spec = part(q, "batch", queries, heads, None)
    sources, weights = (keys, values), (key_weights, value_weights)
    sequences = {"queries": queries, "tokens": tokens}
    names = {name: [sequences.get(axis, axis) for axis in _AXES[name]] for name in arrays}
    in_specs = (
        q_spec,
        jax.tree.map(source, sources, is_leaf=lambda x: isinstance(x, _IN_PLACE)),
        jax.tree.map(lambda x: part(x, None, kv_heads, None), weights),
        {name: part(x, *names[name]) for name, x in arrays.items()},
    )
    part_of_device = _LocalPart(
        gathers=tokens is not None and mesh.shape["context"] > 1,
        groups=q.shape[2] // keys[0].shape[2] if heads is not None and kv_heads is None else None,
    )
    local = functools.partial(_local, local=part_of_device, options=options)
    out_specs = (q_spec, P(*q_spec[:3])) if return_residuals else q_spec
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=free,
        check_vma=False,
    )
    return run(q, sources, weights, arrays)


def ragged_attention(
    q: Float[Array, "T N H"],
    keys: tuple[PagedStream, ...],
    values: tuple[PagedStream, ...],
    rows: RaggedRows,
    key_weights: StreamWeights = None,
    value_weights: StreamWeights = None,
    *,
    return_residuals: bool = False,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """`pallas_kernels.ragged_attention`, its heads split over the mesh that is set, if one is."""
    mesh, free = _free_axes()
    call = functools.partial(
        pallas_kernels.ragged_attention, return_residuals=return_residuals, **options
    )
    if mesh is None:
        return call(q, keys, values, rows, key_weights, value_weights)
    heads, kv_heads = head_axes(q.shape[1], keys[0].shape[2], mesh.shape["tensor"])
    heads = heads if kv_heads else None  # a device has whole groups, or all
    part = functools.partial(_part, mesh, free)
    q_spec = part(q, None, heads, None)
    sources = (keys, values)
    in_specs = (
        q_spec,
        *jax.tree.map(
            functools.partial(_source, part, None, kv_heads),
            sources,
            is_leaf=lambda x: isinstance(x, PagedStream),
        ),
        P(),
        *jax.tree.map(lambda x: part(x, None, kv_heads, None), (key_weights, value_weights)),
    )
    run = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=(q_spec, P(*q_spec[:2])) if return_residuals else q_spec,
        axis_names=free,
        check_vma=False,
    )
    return run(q, keys, values, rows, key_weights, value_weights)


def _part(mesh: AbstractMesh, free: set[str], x: Array, *axes: str | None) -> P:
    """How an array with these logical axes is split."""
    return spec([axis if set(RULES[axis]) <= free else None for axis in axes], x.shape, mesh)


def _source(
    part: Callable[..., P],
    tokens: str | None,
    kv_heads: str | None,
    x: Array | Stacked | PagedStream,
) -> PyTree:
    """How a source is split."""
    if isinstance(x, PagedStream):
        pool = part(x.data, *(None,) * (x.data.ndim - 1), kv_heads)
        if x.scale is None:
            return dataclasses.replace(x, data=pool, slot=P(), table=P())
        scale = part(x.scale, None, None, kv_heads, None)
        if pool[-1] != scale[2]:
            raise ValueError(
                f"scales of pages lie in {x.scale.shape[2]} groups of heads; where heads are split "
                f"over a mesh, each device needs one: create the pool on the mesh"
            )
        return dataclasses.replace(x, data=pool, slot=P(), table=P(), scale=scale)
    if isinstance(x, Stacked):
        axes = (None, "batch", None, kv_heads, None)
        return jax.tree.map(lambda array: part(array, *axes[: array.ndim]), x)
    return part(x, "batch", tokens, kv_heads, None)


def _free_axes() -> tuple[AbstractMesh | None, set[str]]:
    """The mesh that is set and those of its axes that are left to split; None if there are none.

    Where prompts are prefilled in parts, only `tensor` is left.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    return (mesh if any(mesh.shape[axis] > 1 for axis in free) else None), free


# Logical axes of the integer arguments.
_AXES = {
    "q_positions": ("batch", "queries"),
    "kv_positions": ("batch", None),
    "q_segment_ids": ("batch", "queries"),
    "kv_segment_ids": ("batch", "tokens"),
    "kv_lengths": ("batch",),
}


def head_axes(heads: int, kv_heads: int, parts: int) -> tuple[str | None, str | None]:
    """How query heads and KV heads are split; where both are, a device has whole groups."""
    if kv_heads % parts == 0:
        return "heads", "kv_heads"
    if parts % kv_heads == 0 and heads % parts == 0:  # several devices share one KV head
        return "heads", None
    return None, None


class _LocalPart(NamedTuple):
    """What a device has to do to its part of the keys and values before it attends.

    Attributes:
        gathers: fetch the tokens that others hold along `context`.
        groups: where each device has all KV heads and needs one: query heads that share it.
    """

    gathers: bool
    groups: int | None


def _local(
    q: Array,
    sources: tuple[Sources, Sources],
    weights: Weights,
    arrays: dict[str, Array],
    *,
    local: _LocalPart,
    options: dict[str, Any],
) -> Array | tuple[Array, Array]:
    """Attention of one device's rows and heads."""
    if local.gathers:
        whole = functools.partial(jax.lax.all_gather, axis_name="context", axis=1, tiled=True)
        sources = jax.tree.map(whole, sources)
        if "kv_segment_ids" in arrays:
            arrays = arrays | {"kv_segment_ids": whole(arrays["kv_segment_ids"])}
    if local.groups is not None:
        mine = jax.lax.axis_index("tensor") * q.shape[2] // local.groups

        def own(x: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, mine, 1, axis)

        sources = jax.tree.map(lambda x: own(x, 2), sources)
        weights = jax.tree.map(lambda x: own(x, 1), weights)
    return pallas_kernels.attention(q, *sources, *weights, **arrays, **options)
