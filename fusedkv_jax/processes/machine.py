"""What a process runs on: device, processor and versions, for records of results."""

import importlib.metadata
import os
import pathlib
import platform


def environment() -> dict[str, object]:
    """Device and versions, for result files."""
    import jax

    devices = jax.devices()
    return {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{
            name: importlib.metadata.version(name)
            for name in ("fusedkv_jax", "jax", "jaxlib", "flax", "optax")
        },
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
