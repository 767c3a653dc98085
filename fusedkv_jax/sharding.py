"""Sharding: which mesh axes split which logical axis, in one table, and what applies it.

A mesh has four axes. `data` copies the parameters, `fsdp` splits them (and the batch), `tensor`
splits heads, feed-forward and vocabulary, `context` splits the sequence. Without a mesh, or on one
device, every function here leaves its arrays as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath
from jax.typing import ArrayLike
from jaxtyping import PyTree

from fusedkv_jax.mesh import AXES as AXES
from fusedkv_jax.mesh import MeshConfig as MeshConfig
from fusedkv_jax.mesh import MeshError as MeshError
from fusedkv_jax.trees import Leaf
from fusedkv_jax.validation import check_kind

R = TypeVar("R")

# Logical axis -> mesh axes. An axis whose size they do not divide stays whole.
RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": ("context",),
    "width": ("fsdp", "context"),  # of parameters; activations keep it whole
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "hidden": ("tensor",),
    "vocabulary": ("tensor",),
    None: (),
}

# Name of a parameter -> logical axes of its last dimensions. Stacked layers have one more in
# front, and what is not here (norm scales, fusion weights, counters) is copied everywhere.
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocabulary", "width"),
    "head": ("width", "vocabulary"),
    "q_proj": ("width", "heads", None),
    "k_proj": ("width", "kv_heads", None),
    "v_proj": ("width", "kv_heads", None),
    "o_proj": ("heads", None, "width"),
    "q_a_proj": ("width", None),
    "kv_a_proj": ("width", None),
    "kv_b_proj": (None, "heads", None),
    "gate": ("width", "hidden"),
    "up": ("width", "hidden"),
    "down": ("hidden", "width"),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over these devices, by default all that JAX sees.

    Raises:
      MeshError: its axes do not multiply to the number of devices, or do not lie along those of a
        TPU slice.
    """
    check_kind("config", config, MeshConfig, "a MeshConfig", MeshError)
    devices = jax.devices() if devices is None else list(devices)
    if config.devices is not None:
        if config.devices > len(devices):
            raise MeshError(f"mesh.devices={config.devices}, and there are {len(devices)} devices")
        devices = devices[: config.devices]
    sizes = config.sizes(len(devices))
    kind = AxisType.Explicit if config.axis_types == "explicit" else AxisType.Auto
    try:
        return jax.make_mesh(sizes, AXES, axis_types=(kind,) * len(AXES), devices=devices)
    except NotImplementedError:  # of a TPU slice, whose links are along its axes
        torus = "x".join(str(1 + max(d.coords[i] for d in devices)) for i in range(3))
        text = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise MeshError(
            f"mesh {text} does not lie along the axes {torus} of the slice: every size must be a "
            "product of some of those"
        ) from None


def automatic(function: Callable[..., R], out_specs: PyTree) -> Callable[..., R]:
    """Let XLA choose shardings inside a function, under a mesh with explicit axes too.

    Args:
      function: to be traced under `jax.set_mesh`.
      out_specs: the partition of its results there, a tree or a prefix of one.
    """

    def run(*arguments: PyTree) -> R:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or not mesh.explicit_axes:
            return function(*arguments)
        split = jax.sharding.auto_axes(function, out_sharding=out_specs)
        return cast("Callable[..., R]", split)(*arguments)

    return run


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """The partition of an array with these logical axes on a mesh."""
    parts = []
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(name for name in RULES[axis] if mesh.shape[name] > 1)
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        parts.append(names if len(names) > 1 else names[0] if names else None)
    return P(*parts)


def parameter_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """A sharding for every array of a tree of parameters, gradients or optimizer state.

    Args:
      tree: arrays or shapes; a leaf is recognised by the last name in its path that `PARAMETERS`
        has.
      mesh: the mesh.
    """

    def of(path: KeyPath, leaf: Leaf) -> NamedSharding:
        name = matrix_name(path)
        axes: tuple[str | None, ...] = ()
        if name is not None and len(leaf.shape) >= len(PARAMETERS[name]):
            axes = PARAMETERS[name]
        axes = (None,) * (len(leaf.shape) - len(axes)) + axes
        return NamedSharding(mesh, spec(axes, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, tree)


def serving_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """`parameter_shardings` for generation: whole along `context`, whose devices share prompts."""

    def whole(axes: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(name for name in names if name != "context") or None

    return jax.tree.map(
        lambda sharding: NamedSharding(mesh, P(*map(whole, sharding.spec))),
        parameter_shardings(tree, mesh),
    )


def matrix_name(path: KeyPath) -> str | None:
    """The name in `PARAMETERS` of the leaf at this path of a tree, or None."""
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    return next((name for name in reversed(names) if name in PARAMETERS), None)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of [B, T] arrays: rows over `data` and `fsdp`, tokens over `context`."""
    return NamedSharding(mesh, P(("data", "fsdp"), "context"))


def check_batch(
    mesh: Mesh | AbstractMesh, batch_size: int, seq_len: int, microbatches: int = 1
) -> None:
    """Refuse a batch that does not divide over the mesh.

    Raises:
      MeshError: it does not; the message says which sizes would.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (rows * microbatches):
        raise MeshError(
            f"data.batch_size={batch_size} does not divide over data={mesh.shape['data']} x "
            f"fsdp={mesh.shape['fsdp']} x {microbatches} microbatches; use a multiple of "
            f"{rows * microbatches}"
        )
    if seq_len % mesh.shape["context"]:
        raise MeshError(
            f"data.seq_len={seq_len} does not divide over context={mesh.shape['context']}; use a "
            f"multiple of it"
        )


def put_batch(batch: Mapping[str, ArrayLike], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of [B, T] arrays, as `process_rows` says, as global arrays."""
    sharding, (_, parts) = batch_sharding(mesh), process_rows(mesh)
    return {
        name: jax.make_array_from_process_local_data(
            sharding, array, (parts * array.shape[0], *array.shape[1:])
        )
        for name, array in ((name, np.asarray(array)) for name, array in batch.items())
    }


def spread(array: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has whole, and that is the same on all, split over them."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    # `device_put` takes no array there that is committed to a device, such as a restored one.
    return jax.make_array_from_process_local_data(sharding, np.asarray(array), array.shape)


@functools.lru_cache
def process_rows(mesh: Mesh) -> tuple[int, int]:
    """Which rows of every batch this process feeds: part `index` of `count` equal parts.

    Processes whose devices hold the same rows, because the mesh splits sequences or heads over
    them, feed the same part.

    Raises:
      MeshError: a process has no device of the mesh, or some rows of another process.
    """
    blocks = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    held: dict[int, set[int]] = {process: set() for process in range(jax.process_count())}
    for block, devices in enumerate(blocks):
        for device in devices:
            held.setdefault(device.process_index, set()).add(block)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    sizes = {len(part) for part in parts}
    if sizes & {0} or len(sizes) > 1 or sum(map(len, parts)) != len(blocks):
        raise MeshError(
            f"mesh {dict(mesh.shape)} cuts across the {jax.process_count()} processes: each needs "
            "as many devices, and rows of the batch that are its own or those of others entirely; "
            "let data x fsdp be a multiple of the processes, or divide them"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def active_mesh() -> AbstractMesh | None:
    """The mesh that is set around the code being traced, or None if it does not split anything."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Fix how an activation with these logical axes is split, under `jax.set_mesh`."""
    mesh = active_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))
