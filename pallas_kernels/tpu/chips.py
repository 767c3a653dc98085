"""The TPUs that the kernels know, and which of them a call is compiled for."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the choice of a kernel and of its blocks depends on.

    Attributes:
      name: as in the names of topologies.
      matrix: columns of the matrix unit.
      vmem: bytes of vector memory of a core.
      storage: 8-bit types in which this chip can read a cache without emulation.
    """

    name: str
    matrix: int
    vmem: int
    storage: tuple[str, ...]


_OLD = ("int8", "float8_e5m2", "float8_e4m3b11fnuz")
_MIB = 2**20
CHIPS = {
    "v5e": Chip("v5e", 128, 128 * _MIB, _OLD),
    "v5p": Chip("v5p", 128, 64 * _MIB, ("int8",)),
    "v6e": Chip("v6e", 256, 128 * _MIB, _OLD),
    "tpu7x": Chip("tpu7x", 256, 64 * _MIB, ("float8_e4m3fn", "float8_e5m2")),
}
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
}


def current(name: str | None = None) -> Chip:
    """The named chip; else the one that the abstract mesh in context, or the host, has.

    To compile for a TPU without one, say which: `jax.sharding.use_abstract_mesh` of a mesh with
    an `AbstractDevice`, as `pallas_kernels.tpu.compiling_for` does.

    Raises:
      NotImplementedError: not a TPU, or one that the kernels do not know.
    """
    if name is None:
        device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
        name = _KINDS.get(device.device_kind)
        if name is None:
            raise NotImplementedError(
                f"the device is {device.device_kind!r}; these kernels know {', '.join(CHIPS)}"
            )
    return CHIPS[name]


def check_storage(chip: Chip, dtype) -> None:
    """Refuses a cache type that the chip's matrix unit cannot read."""
    name = jnp.dtype(dtype).name
    if name not in ("bfloat16", "float32", *chip.storage):
        raise NotImplementedError(
            f"a cache of {name} is not served on {chip.name}; use bfloat16, float32 or "
            f"{', '.join(chip.storage)}"
        )
