"""Reports in words."""

from __future__ import annotations

from collections.abc import Sequence

from fusedkv_jax.compile_ahead.chips import Slice
from fusedkv_jax.compile_ahead.report import Report, gib
from fusedkv_jax.compile_ahead.search import Trial


def describe_slice(place: Slice) -> str:
    """One line about a slice."""
    chip = place.chip
    devices = "" if chip.per_chip == 1 else f", {place.devices} devices ({chip.per_chip} a chip)"
    return (
        f"{place.name}: {place.chips} chips{devices}; a device has {gib(chip.hbm)} for a program, "
        f"{chip.flops / 1e12:,.0f} TFLOP/s in bfloat16, HBM {chip.hbm_bandwidth / 1e9:,.0f} "
        f"GB/s, links {chip.ici / 1e9:,.0f} GB/s"
    )


def describe(report: Report) -> str:
    """A report of several lines; all figures are those of one device."""
    estimate = report.estimate
    lines = [f"{report.program}, per device (compiled in {report.compile_seconds:.0f} s)"]
    parts = dict(report.parts) | {
        "activations and temporaries": report.temporaries,
        "code": report.code,
    }
    lines += [f"  {name:<30}{gib(size):>14}" for name, size in parts.items()]
    lines.append(
        f"  {'peak':<30}{gib(report.peak):>14}  of {gib(report.capacity)}, "
        f"{report.peak / report.capacity:.0%}: fits"
    )
    lines.append(f"  {'FLOPs':<30}{report.flops / 1e12:>10.3f} TFLOP")
    lines.append(f"  {'HBM traffic':<30}{gib(report.hbm):>14}")
    for kind, (count, size) in report.collectives.items():
        lines.append(f"  {kind:<30}{gib(size):>14}  sent, in {count}")
    kernels = ", ".join(f"{name} x {count}" for name, count in report.kernels.items())
    lines.append(f"  {'attention kernels':<30}{kernels or 'none: attention is plain XLA'}")
    what = {"train": "step", "prefill": "prefill", "decode": "token"}[report.program]
    lines.append(
        f"  estimate, nothing was run: a {what} takes {milliseconds(estimate.seconds)} "
        f"(compute {milliseconds(estimate.compute)}, memory {milliseconds(estimate.memory)}, "
        f"communication {milliseconds(estimate.communication)}), bound by {estimate.bound}; "
        f"{report.tokens / estimate.seconds:,.0f} tokens/s on the slice, "
        f"MFU {estimate.utilization:.0%}"
    )
    return "\n".join(lines)


def describe_trials(trials: Sequence[Trial]) -> str:
    """A table of what a search compiled."""
    lines = [f"  {'settings':<60}{'peak':>12}{'step':>12}{'MFU':>6}  bound by"]
    for trial in trials:
        name = str(trial.candidate)
        if trial.report is None:
            lines.append(f"  {name:<60}does not fit: {gib(trial.missing)} are missing")
            continue
        estimate = trial.report.estimate
        lines.append(
            f"  {name:<60}{gib(trial.report.peak):>12}{milliseconds(estimate.seconds):>12}"
            f"{estimate.utilization:>6.0%}  {estimate.bound}"
        )
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    """A time in words."""
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"
