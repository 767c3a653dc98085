"""Which TPU a call is compiled for, and what caches it can read; `devices` has the facts."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import devices
from pallas_kernels.devices import CHIPS, Chip


def current(name: str | None = None) -> Chip:
    """The named chip; else the one that the abstract mesh in context, or the host, has.

    To compile for a TPU without one, say which: `jax.sharding.use_abstract_mesh` of a mesh with
    an `AbstractDevice`, as `pallas_kernels.tpu.compiling_for` does.

    Raises:
      NotImplementedError: not a TPU, or one that the kernels do not know.
    """
    if name is None:
        device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
        chip = devices.tpu(device.device_kind)
        if chip is None:
            raise NotImplementedError(
                f"the device is {device.device_kind!r}; these kernels know {', '.join(CHIPS)}"
            )
        return chip
    return CHIPS[name]


def check_storage(chip: Chip, dtype: DTypeLike) -> None:
    """Refuses a cache type that the chip's matrix unit cannot read."""
    name = jnp.dtype(dtype).name
    if name not in ("bfloat16", "float32", *chip.storage):
        raise NotImplementedError(
            f"a cache of {name} is not served on {chip.name}; use bfloat16, float32 or "
            f"{', '.join(chip.storage)}"
        )
