"""Too little memory, said before it is used up, with what to lower."""

import os
import pathlib

import jax
from jax.sharding import Mesh

_REMEDY = (
    "lower data.batch_size or data.seq_len, raise train.grad_accumulation, set model.remat=full, "
    "or take a smaller model"
)
_CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")


class InsufficientMemoryError(ValueError):
    """The machine has less memory than a run needs."""


def check_memory(what: str, nbytes: float) -> None:
    """Refuse what a CPU's memory cannot hold: no allocator of its own would say so in time.

    Args:
      what: the name of what is to be allocated, for the message.
      nbytes: over all devices of this process.

    Raises:
      InsufficientMemoryError: it is more than the machine has.
    """
    if jax.default_backend() != "cpu":
        return  # the device's allocator does
    total = _memory()
    if nbytes > total:
        raise InsufficientMemoryError(
            f"{what} needs {nbytes / 2**30:,.1f} GiB and this machine has {total / 2**30:,.1f}; "
            f"{_REMEDY}"
        )


def step_bytes(compiled: jax.stages.Compiled, mesh: Mesh) -> float:
    """What a compiled step holds at once on this process's devices; 0 where that is not known.

    Args:
      compiled: the step.
      mesh: what it is spread over; the other devices of the process hold nothing.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return 0.0
    one = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    return one * len(mesh.local_devices)


def _memory() -> float:
    """Bytes of memory that this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no such limit
        return total
