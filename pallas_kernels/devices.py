"""Facts about chips, in one place: for kernels and their choice, for rooflines and for the MFU.

From cloud.google.com/tpu/docs (pages v4, v5e, v5p, v6e, tpu7x) and NVIDIA's data sheets. Figures
are for one device as JAX counts devices: the two cores of a tpu7x are a device each.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of TPU that kernels and programs are compiled for.

    Interconnect bandwidth is published for both directions together and halved here. `hbm` is what
    the compiler lets a program use; it names the figure when a program needs more.

    Attributes:
      name: as in the names of slices.
      kinds: JAX's names of it (`device_kind`), of several of its versions.
      per_chip: devices of a chip.
      cores: TensorCores of a device, which share its memory.
      matrix: columns of the matrix unit.
      vmem: bytes of vector memory of a core.
      storage: 8-bit types in which it reads a cache without emulation.
      flops: dense bfloat16 FLOP/s.
      hbm: bytes of memory that a program can use.
      hbm_bandwidth: bytes a second.
      ici: bytes a second that a device can send to other chips, over all its links.
    """

    name: str
    kinds: tuple[str, ...]
    per_chip: int = 1
    cores: int = 1
    matrix: int
    vmem: int
    storage: tuple[str, ...]
    flops: float
    hbm: int
    hbm_bandwidth: float
    ici: float


_MIB, _GIB = 2**20, 2**30
_FOUR_EXPONENT_BITS = ("int8", "float8_e5m2", "float8_e4m3b11fnuz")
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            kinds=("TPU v5 lite", "TPU v5e"),
            matrix=128,
            vmem=128 * _MIB,
            storage=_FOUR_EXPONENT_BITS,
            flops=197e12,
            hbm=int(15.75 * _GIB),
            hbm_bandwidth=819e9,
            ici=200e9,
        ),
        Chip(
            name="v6e",
            kinds=("TPU v6 lite", "TPU v6e"),
            matrix=256,
            vmem=128 * _MIB,
            storage=_FOUR_EXPONENT_BITS,
            flops=918e12,
            hbm=int(31.25 * _GIB),
            hbm_bandwidth=1640e9,
            ici=400e9,
        ),
        Chip(
            name="v5p",
            kinds=("TPU v5", "TPU v5p"),
            cores=2,
            matrix=128,
            vmem=64 * _MIB,
            storage=("int8",),
            flops=459e12,
            hbm=int(95.74 * _GIB),
            hbm_bandwidth=2765e9,
            ici=600e9,
        ),
        Chip(
            name="tpu7x",
            kinds=("TPU7x", "TPU v7x"),
            per_chip=2,
            matrix=256,
            vmem=64 * _MIB,
            storage=("float8_e4m3fn", "float8_e5m2"),
            flops=2307e12 / 2,
            hbm=int(94.75 * _GIB),
            hbm_bandwidth=7380e9 / 2,
            ici=600e9 / 2,
        ),
    )
}
_KINDS = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU.

    Attributes:
      kinds: JAX's names of it.
      capability: compute capability, 90 for 9.0.
      cores: streaming multiprocessors.
      flops: dense bfloat16 FLOP/s.
      memory: bytes.
      bandwidth: bytes of memory a second.
      host_bandwidth: bytes a second between device and host memory, each way, as PCIe carries them.
    """

    kinds: tuple[str, ...]
    capability: int
    cores: int
    flops: float
    memory: float
    bandwidth: float
    host_bandwidth: float = 50e9


GPUS = {
    "a100": Gpu(
        kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"),
        capability=80,
        cores=108,
        flops=312e12,
        memory=80e9,
        bandwidth=2.039e12,
        host_bandwidth=25e9,
    ),
    "l40s": Gpu(
        kinds=("NVIDIA L40S",),
        capability=89,
        cores=142,
        flops=362e12,
        memory=48e9,
        bandwidth=0.864e12,
        host_bandwidth=25e9,
    ),
    "h100": Gpu(
        kinds=("NVIDIA H100 80GB HBM3",),
        capability=90,
        cores=132,
        flops=989e12,
        memory=80e9,
        bandwidth=3.35e12,
    ),
    "h200": Gpu(
        kinds=("NVIDIA H200",),
        capability=90,
        cores=132,
        flops=989e12,
        memory=141e9,
        bandwidth=4.8e12,
    ),
    "b200": Gpu(
        kinds=("NVIDIA B200",),
        capability=100,
        cores=148,
        flops=2250e12,
        memory=180e9,
        bandwidth=8e12,
    ),
}

# Shared memory that one program may have, by compute capability (CUDA programming guide, table of
# technical specifications), in KiB; the least of them for one that is not here.
_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


def shared_memory(capability: int) -> int:
    """Bytes of shared memory that a program may have on a GPU of this compute capability."""
    return 1024 * _SHARED.get(capability, min(_SHARED.values()))


_FLOPS = {kind: chip.flops for chip in (*CHIPS.values(), *GPUS.values()) for kind in chip.kinds}
_FLOPS["TPU v4"] = 275e12  # it trains; no kernel here is compiled for it


def tpu(kind: str) -> Chip | None:
    """The TPU that JAX calls `kind`, or None if the kernels do not know it."""
    return _KINDS.get(kind)


def peak_flops(kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device that JAX calls `kind`, or None where unknown."""
    return _FLOPS.get(kind)
