"""Compiling for a TPU on a machine without one, with the compiler that jax's tpu extra installs."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.stages import Compiled

# Chips of one host of each kind: the smallest topologies without special cases.
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "tpu7x": "tpu7x:2x2x1"}
# They keep the compiler from asking a metadata server, and processes from excluding each other.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@functools.cache  # devices of two calls are not the same device
def slice_devices(name: str) -> Sequence[Any]:
    """The compile-only devices of a slice.

    Args:
      name: a kind of chip and how many there are along each axis of the torus, as in "v5p:4x4x8".

    Raises:
      NotImplementedError: libtpu, which jax's tpu extra installs, is missing or refuses the name.
    """
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    single = {"chips_per_host_bounds": (1, 1, 1)} if name.endswith(":1x1") else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **single).devices
    except Exception as error:  # jax passes on whatever the plug-in raises
        raise NotImplementedError(
            f"compiling for {name} needs libtpu (pip install 'jax[tpu]'): {error}"
        ) from error


def devices(chip: str) -> Sequence[Any]:
    """The compile-only devices of a host of this chip, as `slice_devices` gives them."""
    return slice_devices(TOPOLOGIES[chip])


@contextlib.contextmanager
def compiling_for(chip: str) -> Iterator[None]:
    """Within it, tracing chooses kernels for `chip`, whatever device the program runs on."""
    kind = devices(chip)[0]
    abstract = jax.sharding.AbstractDevice(kind.device_kind, getattr(kind, "num_cores", 1), "tpu")
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    ):
        yield


def compile_for(
    chip: str, function: Callable, *specs: object, donate: tuple[int, ...] = ()
) -> Compiled:
    """`function` compiled for one device of `chip`; `specs` are trees of arrays or their shapes.

    `memory_analysis()` of the result gives the bytes of arguments, aliases and temporaries.
    """
    put = jax.sharding.SingleDeviceSharding(devices(chip)[0])
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=put), specs)
    with compiling_for(chip):
        return jax.jit(function, donate_argnums=donate).lower(*specs).compile()
