"""What compilers say of the kernels on a machine without an accelerator; nothing is timed."""

from typing import Any

from experiments.benchmarks.report import Measurement, Target
from pallas_kernels import devices

CHIPS = ("v5e", "v6e", "v5p", "tpu7x")
GPUS = ("a100", "l40s", "h100", "b200")  # one of each compute capability
# What is held against stock splash attention: the target of each (chip, kernel), if it has one.
KERNELS = ("splash", "plain", "tile", "folded")
BOUNDS = {("v6e", "folded"): 1.05, ("v5e", "tile"): 1.20}


def tpu_schedules(*, quick: bool) -> Measurement:
    """VLIW bundles and matrix-unit slots of a step over 512 keys, beside stock splash attention."""
    title = "TPU: bundles (about cycles) for 512 more keys, H = 128, 1024 query rows; static"
    try:
        from pallas_kernels.tpu import static, topology

        topology.devices("v5e")
    except (ImportError, NotImplementedError) as reason:
        return Measurement(title, skipped=str(reason).splitlines()[0])
    rows, targets = [], []
    for chip in CHIPS[:1] if quick else CHIPS:
        stock = static.splash_cost(chip)
        for kernel in ("splash",) if quick else KERNELS:
            cost = stock if kernel == "splash" else static.step_cost(chip, kernel)
            ratio = cost["bundles"] / stock["bundles"]
            slots = sum(count for name, count in cost.items() if "MXU" in name)
            rows.append(
                {
                    "chip": chip,
                    "kernel": kernel,
                    "bundles": cost["bundles"],
                    "of splash's": ratio,
                    "matrix slots": slots,
                    "matrix slots a bundle": slots / cost["bundles"],
                }
            )
            if bound := BOUNDS.get((chip, kernel)):
                name = f"{chip} {kernel}: bundles, of splash attention's"
                targets.append(Target(name, ratio, "<=", bound))
    setting = {
        "splash": "jax's splash attention on one source, the better of 256 and 512 keys a product",
        "accuracy": "within a tenth; blind to memory stalls",
    }
    return Measurement(title, setting, rows, targets)


def gpu_resources(chip: str, *, quick: bool) -> Measurement:
    """Registers, spills and shared memory of every GPU kernel, compiled for a chip."""
    capability = devices.GPUS[chip].capability
    title = f"GPU: resources of the kernels, compiled for sm_{capability} ({chip}); static"
    try:
        from pallas_kernels.gpu import static, workloads

        rows = static.report(chip, workloads.CALLS[:1] if quick else workloads.CALLS)
    except (ImportError, NotImplementedError) as reason:
        return Measurement(title, skipped=str(reason).splitlines()[0])
    setting = {"heads": 32, "kv_heads": 8, "keys": 4096}
    if chip == "h100" and not quick:
        more, left_out = _mosaic_gpu()
        rows, setting = rows + more, setting | left_out
    limit = devices.shared_memory(capability)
    return Measurement(
        title,
        setting,
        rows,
        [
            Target(
                "bytes of a thread spilled, most", max(x["spill"] for x in rows), "<=", static.SPILL
            ),
            Target("bytes of shared memory, largest", max(x["shared"] for x in rows), "<=", limit),
            Target("kernels with serialized wgmma", sum(x["serialized"] for x in rows), "==", 0),
        ],
    )


def _mosaic_gpu() -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of Hopper's own kernel, or why there are none, as a line of the setting."""
    try:
        from pallas_kernels.mosaic_gpu import static

        return static.report(), {}
    except (ImportError, NotImplementedError) as reason:
        return [], {"mosaic_gpu": f"left out: {str(reason).splitlines()[0]}"}
