"""Compiling for a TPU on a machine without one, with the compiler that jax's tpu extra installs."""

import contextlib
import functools
import os

import jax
from jax.experimental import topologies

# Chips of one host of each kind: the smallest topologies without special cases.
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "tpu7x": "tpu7x:2x2x1"}
# They keep the compiler from asking a metadata server, and processes from excluding each other.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@functools.cache
def devices(chip: str):
    """The compile-only devices of a host of this chip.

    Raises:
      NotImplementedError: libtpu, which jax's tpu extra installs, is missing.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    except Exception as error:  # jax passes on whatever the plug-in raises
        raise NotImplementedError(
            f"compiling for {chip} needs libtpu (pip install 'jax[tpu]'): {error}"
        ) from error
    return topology.devices


@contextlib.contextmanager
def compiling_for(chip: str):
    """Within it, tracing chooses kernels for `chip`, whatever device the program runs on."""
    kind = devices(chip)[0]
    abstract = jax.sharding.AbstractDevice(kind.device_kind, getattr(kind, "num_cores", 1), "tpu")
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    ):
        yield


def compile_for(chip: str, function, *specs, donate=()):
    """`function` compiled for one device of `chip`; `specs` are trees of arrays or their shapes.

    `memory_analysis()` of the result gives the bytes of arguments, aliases and temporaries.
    """
    put = jax.sharding.SingleDeviceSharding(devices(chip)[0])
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=put), specs)
    with compiling_for(chip):
        return jax.jit(function, donate_argnums=donate).lower(*specs).compile()
