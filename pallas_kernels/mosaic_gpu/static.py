"""What the compilers make of the kernel for an H100, on any machine: registers, spills, TMA.

XLA's plugin for CUDA compiles for a description of a GPU as it does for a GPU, and has the
assembler in it. Nothing here says how fast the kernel is.
"""

import contextlib
import functools
import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from pallas_kernels.devices import GPUS, shared_memory
from pallas_kernels.gpu import workloads
from pallas_kernels.gpu.workloads import Workload
from pallas_kernels.mosaic_gpu import arguments, kernel, plan_of
from pallas_kernels.mosaic_gpu.plan import BLOCK, CONSUMERS, Plan

CALLS = tuple(
    x
    for x in workloads.CALLS
    if x.name.startswith(("prefill, plain", "training")) and x.size <= 128
)
_DUMP = "MOSAIC_GPU_DUMP_TO"  # where jaxlib leaves the program and what the assembler says


def report(shapes: Sequence[Workload] = CALLS) -> list[dict[str, Any]]:
    """A line for the kernel of every call that it serves; see `line`.

    Raises:
      NotImplementedError: the plugin is missing.
    """
    device()
    lines = []
    for workload in shapes:
        with contextlib.suppress(NotImplementedError):  # what the kernel does not serve
            lines.append({"chip": "h100", "call": workload.name, **line(workload)})
    return lines


def line(workload: Workload) -> dict[str, Any]:
    """Block sizes of a call, and what `compiled` finds."""
    call = jax.eval_shape(functools.partial(workloads.sequence, workload))
    plan = plan_of(call)
    sizes = {"rows": BLOCK, "keys": plan.keys, "warps": 4 * (CONSUMERS + 2), "stages": plan.stages}
    return {"kernel": "mosaic_gpu", **sizes, **compiled(plan, call)}


def compiled(plan: Plan, call: Any) -> dict[str, int]:
    """What the compilers make of a call.

    Args:
      plan: of the call.
      call: `AttentionCall` of shapes.

    Returns:
      registers: of a thread when a block starts; then producers give theirs to consumers.
      spill: bytes of a thread that are stored to memory for want of registers.
      shared: bytes of shared memory for tiles.
      wgmma: instructions of the matrix units; `serialized`: 1 where the assembler waits for each
        of them (its warning C7515), as it could not keep their operands apart.
      tma: bulk copies of tensors to shared memory.

    Raises:
      NotImplementedError: the plugin is missing.
    """
    place = jax.sharding.SingleDeviceSharding(device())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(functools.partial(arguments, plan), call),
    )
    lowered = jax.jit(functools.partial(kernel.forward, plan)).lower(*shapes)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[_DUMP] = folder
        try:
            lowered.compile()
        finally:
            del os.environ[_DUMP]
        ptx, log = (next(pathlib.Path(folder).glob(x)).read_text() for x in ("*.ptx", "*.ptxas"))
    number = lambda pattern: int(re.search(pattern, log).group(1))  # noqa: E731  # pyright: ignore
    return {
        "registers": number(r"Used (\d+) registers"),
        "spill": number(r"(\d+) bytes spill stores"),
        "shared": plan.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "serialized": int("C7515" in log),
        # jax 0.12 names shared memory by the block, those before by its cluster.
        "tma": len(re.findall(r"cp\.async\.bulk\.tensor\S*shared::\w+\.global", ptx)),
    }


@functools.cache
def device() -> Any:
    """An H100 to compile for.

    Raises:
      NotImplementedError: the plugin is missing.
    """
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise NotImplementedError("needs jax-cuda13-plugin: pip install '.[gpu-compile]'")
    facts = GPUS["h100"]
    major, minor = divmod(facts.capability, 10)
    config = f"""
      platform_name: "CUDA"
      device_description_str: "{facts.kinds[0]}"
      dnn_version_info {{ major: 9 }}
      gpu_device_info {{
        cuda_compute_capability {{ major: {major} minor: {minor} }}
        core_count: {facts.cores}
        device_memory_size: {int(facts.memory)}
        memory_bandwidth: {int(facts.bandwidth)}
        threads_per_warp: 32
        threads_per_block_limit: 1024
        threads_per_core_limit: 2048
        registers_per_block_limit: 65536
        registers_per_core_limit: 65536
        shared_memory_per_block: 49152
        shared_memory_per_block_optin: {shared_memory(facts.capability)}
        shared_memory_per_core: 233472
        block_dim_limit_x: 2147483647
        block_dim_limit_y: 65535
        block_dim_limit_z: 65535
        fpus_per_core: 128
        clock_rate_ghz: 1.98
        l2_cache_size: 52428800
      }}
    """
    try:
        found = topologies.get_topology_desc("h100", "cuda", topology="1x1x1", target_config=config)
    except NotImplementedError:
        raise NotImplementedError(
            "jax-cuda13-plugin did not start; it does with JAX_PLATFORMS=cpu"
        ) from None
    return found.devices[0]
