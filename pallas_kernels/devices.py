"""Facts about chips on which kernels and their choice depend, in one place."""

import dataclasses


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
# JAX's names of these chips (`device_kind`), of several of its versions.
KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
}


def tpu(kind: str) -> Chip | None:
    """The TPU that JAX calls `kind`, or None if the kernels do not know it."""
    return CHIPS.get(KINDS.get(kind, ""))
