"""Replay a recorded trace against scheduling policies and layouts, on a modeled device.

    python -m experiments.simulate --trace=azure_conv_2023.csv.xz --device=v5e \\
        --layout=mha --layout=fusedkv --policy=fcfs --load=0.5 --load=0.9

The scheduler and the memory are the real ones; only the time of a step is computed, as the
roofline of its work, or as `experiments.calibrate` has fitted it to steps of a real engine. A load
of 1 is the rate at which the first layout and policy serve the trace when all of it is there at
once. Writes simulation.json, .md and .png into --output_dir; the last line is the same as one JSON
document.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence

from absl import flags

from experiments.common import cli
from experiments.common.documents import Document
from fusedkv_jax import costs, presets
from fusedkv_jax.serving import POLICIES, PagedMemory, Scheduler
from fusedkv_jax.serving.simulate import (
    Arrival,
    CalibratedDevice,
    Device,
    Summary,
    device,
    read_trace,
    requests,
    simulate,
    summarize,
)

FLAGS = flags.FLAGS
Place = Device | CalibratedDevice


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_string(
        "trace",
        None,
        "Recorded requests: Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens) or Mooncake's "
        "JSON lines; plain or .xz.",
    )
    flags.DEFINE_multi_enum(
        "policy", ["fcfs"], sorted(POLICIES), "Scheduling policy; may be repeated."
    )
    flags.DEFINE_multi_string(
        "layout", ["mha", "fusedkv"], "Layout, as for experiments.costs; may be repeated."
    )
    flags.DEFINE_string("preset", "1_5b", f"Model size: {', '.join(presets.names())}.")
    flags.DEFINE_string(
        "device",
        "v5e",
        "A TPU slice such as v5e:2x2, or a100, h100, h200, in bfloat16; or the calibration.json of "
        "experiments.calibrate.",
    )
    flags.DEFINE_multi_float(
        "load", [0.9], "Rate of arrivals, as a fraction of what the device serves; may be repeated."
    )
    flags.DEFINE_string(
        "cache_dtype", None, "Storage type of the cache; default bfloat16, or the calibration's."
    )
    flags.DEFINE_integer("num_requests", None, "Use the first so many requests.", 1)
    flags.DEFINE_integer("page_size", 16, "Tokens of a page.", 1, 65536)
    flags.DEFINE_integer(
        "num_pages", None, "Pages of the device; default what its memory holds.", 1
    )
    flags.DEFINE_float(
        "host_tier", 0.0, "Pages in host memory, as a multiple of the device's pages.", 0.0, 1000.0
    )
    flags.DEFINE_bool(
        "async_scheduling", False, "Plan each step when the one before begins, as engines do."
    )
    flags.DEFINE_integer("max_num_seqs", 256, "Requests in a step.", 1)
    flags.DEFINE_integer("max_num_batched_tokens", 2048, "Tokens in a step.", 1)
    flags.DEFINE_float("slo_ttft", 2.0, "Objective: seconds to the first token.", 0.0)
    flags.DEFINE_float("slo_tpot", 0.1, "Objective: seconds for each further token.", 0.0)
    flags.DEFINE_string("output_dir", "runs/simulate", "Where the results are written.")


_COLUMNS = (
    # heading, value of a row, format
    ("layout", lambda row: row["layout"], "s"),
    ("policy", lambda row: row["policy"], "s"),
    ("load", lambda row: row["load"], ".2f"),
    ("requests/s", lambda row: row["request_rate"], ".2f"),
    ("goodput/s", lambda row: row["goodput"], ".2f"),
    ("TTFT p50 s", lambda row: row["ttft"][0], ".3f"),
    ("TTFT p99 s", lambda row: row["ttft"][2], ".3f"),
    ("TPOT p50 ms", lambda row: 1e3 * row["tpot"][0], ".1f"),
    ("TPOT p99 ms", lambda row: 1e3 * row["tpot"][2], ".1f"),
    ("mean latency s", lambda row: row["mean_latency"], ".2f"),
    ("hits %", lambda row: 100 * row["hit_rate"], ".1f"),
    ("preempted", lambda row: row["preemptions"], "d"),
)


def main() -> None:
    trace = cli.check_readable(cli.require("trace"))
    place, arrivals = _device(FLAGS.device), read_trace(trace)
    arrivals = arrivals[: FLAGS.num_requests]
    usual = place.cache_dtype if isinstance(place, CalibratedDevice) else "bfloat16"
    cache_dtype = FLAGS.cache_dtype or usual
    models = {
        layout: costs.StepCosts.of(
            presets.get(FLAGS.preset, layout=layout), cache_dtype=cache_dtype
        )
        for layout in FLAGS.layout
    }
    for load in FLAGS.load:
        if not 1e-3 <= load <= 1e3:
            raise ValueError(f"--load={load}; use 0.001 to 1000")
    folder = cli.check_output(FLAGS.output_dir, folder=True)
    first = models[FLAGS.layout[0]]
    capacity = _run(place, first, FLAGS.policy[0], arrivals, math.inf).request_rate
    print(
        f"{len(arrivals):,} requests on {place.name}, {FLAGS.preset}: load 1 is {capacity:.2f}"
        f" requests a second ({FLAGS.layout[0]}, {FLAGS.policy[0]})",
        flush=True,
    )
    rows = []
    for layout, step_costs in models.items():
        for policy in FLAGS.policy:
            for load in FLAGS.load:
                start = time.monotonic()
                summary = _run(place, step_costs, policy, arrivals, load * capacity)
                rows.append({"layout": layout, "policy": policy, "load": load})
                rows[-1] |= dataclasses.asdict(summary)
                took = time.monotonic() - start
                print(f"{layout} {policy} load {load}: simulated in {took:.1f} s", file=sys.stderr)
    document = {
        "trace": trace.name,
        "requests": len(arrivals),
        "preset": FLAGS.preset,
        "device": dataclasses.asdict(place),
        "pages": {name: _pages(place, step_costs) for name, step_costs in models.items()},
        "capacity": capacity,
        "objectives": {"ttft": FLAGS.slo_ttft, "tpot": FLAGS.slo_tpot},
        "settings": {"cache_dtype": cache_dtype}
        | {
            name: FLAGS[name].value
            for name in (
                "page_size",
                "host_tier",
                "async_scheduling",
                "max_num_seqs",
                "max_num_batched_tokens",
            )
        },
        "rows": rows,
    }
    text = table(rows)
    print(text)
    (folder / "simulation.md").write_text(text + "\n")
    (folder / "simulation.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(rows, folder / "simulation.png")
    print(json.dumps(document))


def table(rows: Sequence[Document]) -> str:
    """A Markdown table of the rows."""
    heads = [heading for heading, _, _ in _COLUMNS]
    lines = [heads, ["---" if form == "s" else "---:" for _, _, form in _COLUMNS]]
    lines += [[f"{value(row):{form}}" for _, value, form in _COLUMNS] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(rows: Sequence[Document], path: pathlib.Path) -> None:
    """Goodput, TTFT and TPOT against the load, a line for each layout and policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = (
        ("goodput (requests/s)", lambda row: row["goodput"]),
        ("TTFT p99 (s)", lambda row: row["ttft"][2]),
        ("TPOT p99 (ms)", lambda row: 1e3 * row["tpot"][2]),
    )
    lines = dict.fromkeys((row["layout"], row["policy"]) for row in rows)
    for axes, (label, value) in zip(figure.subplots(1, 3), panels, strict=True):
        for number, (layout, policy) in enumerate(lines):
            points = sorted(
                (row["load"], value(row))
                for row in rows
                if (row["layout"], row["policy"]) == (layout, policy)
            )
            marker = "os^Dv<>pP*X"[number % 11]
            axes.plot(*zip(*points, strict=True), f"{marker}-", label=f"{layout}, {policy}")
        axes.set_xlabel("load")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _device(name: str) -> Place:
    if name.endswith(".json"):
        return CalibratedDevice.read(cli.check_readable(name))
    return device(name)


def _pages(place: Place, step_costs: costs.StepCosts) -> int:
    return FLAGS.num_pages or place.num_pages(step_costs, FLAGS.page_size)


def _run(
    place: Place,
    step_costs: costs.StepCosts,
    policy: str,
    arrivals: Sequence[Arrival],
    rate: float,
) -> Summary:
    size, pages = FLAGS.page_size, _pages(place, step_costs)
    scheduler = Scheduler(
        PagedMemory(pages, size, host_pages=int(FLAGS.host_tier * pages)),
        POLICIES[policy](),
        max_num_seqs=FLAGS.max_num_seqs,
        max_num_batched_tokens=FLAGS.max_num_batched_tokens,
        seconds_per_page=place.seconds_per_page(step_costs, size),
    )
    steps = 0

    def watch(*_: object) -> None:
        nonlocal steps
        steps += 1

    records = simulate(
        requests(arrivals, rate),
        scheduler,
        lambda plan: place.step_seconds(step_costs, plan, size),
        watch,
        overlaps=FLAGS.async_scheduling,
    )
    return summarize(
        records,
        ttft_slo=FLAGS.slo_ttft,
        tpot_slo=FLAGS.slo_tpot,
        preemptions=scheduler.preemptions,
        steps=steps,
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
