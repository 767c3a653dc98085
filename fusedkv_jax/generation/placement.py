"""Where generation runs: one device, or a mesh with parameters, rows and caches split over it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh
from jaxtyping import PyTree

from fusedkv_jax.cache import KVCache, cache_shardings
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.sharding import AXES, MeshError, serving_shardings

Tree = TypeVar("Tree")


@functools.lru_cache(maxsize=256)  # a function that is jitted anew is compiled anew
def _allocation(
    mesh: Mesh, config: ModelConfig, rows: int, length: int, dtype: str | None
) -> Callable[[], KVCache]:
    create = functools.partial(
        KVCache.create, config, batch_size=rows, max_length=length, dtype=dtype
    )
    return jax.jit(create, out_shardings=cache_shardings(jax.eval_shape(create), mesh))


def mesh_workers() -> int:
    """Parts in which the mesh that is set takes prompts; 1 without one. Known while tracing.

    Raises:
        MeshError: as `Placement.of`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    _check_axes(mesh)
    return mesh.shape["context"]


def _check_axes(mesh: Mesh | AbstractMesh) -> None:
    if sorted(mesh.axis_names) != sorted(AXES):
        raise MeshError(
            f"mesh has axes {', '.join(map(str, mesh.axis_names))}; generation needs"
            f" {', '.join(AXES)}, as fusedkv_jax.sharding.make_mesh gives them"
        )


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, or none for a single device."""

    mesh: Mesh | None = None

    @classmethod
    def of(cls, mesh: Mesh | None) -> Placement:
        """On a mesh; by default the one that `jax.set_mesh` has set, if any.

        Raises:
            MeshError: its axes are not those of `fusedkv_jax.sharding.make_mesh`.
        """
        if mesh is None:
            mesh = jax.sharding.get_mesh()
            if mesh.empty:
                return cls()
        _check_axes(mesh)
        types = (AxisType.Auto,) * len(mesh.axis_names)
        return cls(Mesh(mesh.devices, mesh.axis_names, axis_types=types))

    def active(self) -> contextlib.AbstractContextManager[object]:
        """What programs run under."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def parameters(self, params: PyTree) -> PyTree:
        """Parameters where they belong; those that are there already are not copied."""
        if self.mesh is None:
            return params
        return jax.device_put(params, serving_shardings(params, self.mesh))

    def cache(
        self, config: ModelConfig, *, batch_size: int, max_length: int, dtype: str | None
    ) -> KVCache:
        """An empty cache, as `KVCache.create` makes it, but never whole on one device."""
        if self.mesh is None:
            return KVCache.create(config, batch_size=batch_size, max_length=max_length, dtype=dtype)
        return _allocation(self.mesh, config, batch_size, max_length, dtype)()

    def allocated(self, create: Callable[[], Tree]) -> Tree:
        """Caches as a function makes them, but never whole on one device."""
        if self.mesh is None:
            return create()
        shardings = cache_shardings(jax.eval_shape(create), self.mesh)
        return jax.jit(create, out_shardings=shardings)()

    @property
    def workers(self) -> int:
        """Parts in which a prompt can be prefilled."""
        return 1 if self.mesh is None else self.mesh.shape["context"]

    def rows(self, count: int) -> int:
        """The next number of rows that divides over the mesh."""
        parts = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-count // parts) * parts
