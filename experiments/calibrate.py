"""Fit the simulator's step times to steps of the real engine, on the device of this machine.

    python -m experiments.calibrate --preset=demo --layout=mha --layout=fusedkv
    python -m experiments.simulate --trace=TRACE --preset=demo \\
        --device=runs/calibrate/calibration.json

An engine of each layout, with random weights, serves mixed load. Of three steps two are fitted to,
a coefficient for each kind of work and all layouts together; the error is told of the third. Then
engine and simulator serve the same requests, which come by a Poisson process: chats, summaries and
stories. Writes calibration.json into --output_dir, and prints how far the simulator is off; the
last line is a JSON document.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any, NamedTuple

import numpy as np
from absl import flags

import fusedkv_jax as fkv
from experiments.common import cli
from fusedkv_jax import costs, presets, serving
from fusedkv_jax.serving.simulate import CalibratedDevice, Summary, replay, simulate, summarize
from fusedkv_jax.serving.simulate.calibration import LoggedStep, errors, fit, step_work

FLAGS = flags.FLAGS

_HELD_OUT = 3  # one step of so many is not fitted to
_LOAD = 0.7  # of the rate at which all requests are served when they are there at once


class LengthMix(NamedTuple):
    """Requests whose lengths are fractions of the longest one; any between two is as likely.

    Attributes:
        prompt, output: the smallest and the largest fraction.
    """

    prompt: tuple[float, float]
    output: tuple[float, float]


WORKLOADS = {
    "chat": LengthMix((1 / 64, 1 / 4), (1 / 32, 1 / 8)),
    "summaries": LengthMix((3 / 8, 3 / 4), (1 / 64, 1 / 16)),
    "stories": LengthMix((1 / 64, 1 / 32), (1 / 8, 3 / 8)),
}


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_string("preset", "demo", f"Model size: {', '.join(presets.names())}.")
    flags.DEFINE_multi_string("layout", ["mha", "fusedkv"], "Layout; may be repeated.")
    flags.DEFINE_string("cache_dtype", None, "Storage type of the cache; default the model's.")
    flags.DEFINE_integer("max_num_seqs", 16, "Requests in a step.", 1)
    flags.DEFINE_integer("max_num_batched_tokens", 256, "Tokens in a step.", 1)
    flags.DEFINE_integer("page_size", 16, "Tokens of a page.", 1)
    flags.DEFINE_integer("max_model_len", None, "Tokens of a request; default the model's.", 16)
    flags.DEFINE_integer("steps", 600, "Steps of each layout.", 30)
    flags.DEFINE_integer("requests", 100, "Requests of each workload that is served; 0: none.", 0)
    flags.DEFINE_string("output_dir", "runs/calibrate", "Where the results are written.")


def main() -> None:
    import jax

    folder = cli.check_output(FLAGS.output_dir, folder=True)
    names = ("max_num_seqs", "max_num_batched_tokens", "page_size", "max_model_len", "cache_dtype")
    chosen: dict[str, Any] = {name: FLAGS[name].value for name in names}
    settings = serving.ServingSettings(memory="pages", **chosen)
    models = {layout: presets.get(FLAGS.preset, layout=layout) for layout in FLAGS.layout}
    cache_dtype = FLAGS.cache_dtype or models[FLAGS.layout[0]].dtype
    models_costs = {
        layout: costs.StepCosts.of(config, cache_dtype=cache_dtype)
        for layout, config in models.items()
    }
    engines = {layout: make_engine(config, settings) for layout, config in models.items()}
    logs = {layout: log_steps(engines[layout], models_costs[layout]) for layout in models}
    fitted = [s for log in logs.values() for i, s in enumerate(log) if i % _HELD_OUT]
    held_out = {layout: log[::_HELD_OUT] for layout, log in logs.items()}
    coefficients = fit(fitted)
    found = {
        layout: float(np.median(errors(coefficients, log))) for layout, log in held_out.items()
    }
    everything = [step for log in held_out.values() for step in log]
    device = CalibratedDevice(
        name=jax.devices()[0].device_kind,
        coefficients=coefficients,
        shapes=settings.make_shapes(),
        cache_dtype=cache_dtype,
        memory=float(settings.cache_bytes(models[FLAGS.layout[0]])),
        median_error=float(np.median(errors(coefficients, everything))),
    )
    device.write(folder / "calibration.json")
    print(f"| layout | steps | median ms | median error %, of {len(everything)} held-out steps |")
    print("| --- | ---: | ---: | ---: |")
    for layout, error in found.items():
        middle = 1e3 * np.median([step.seconds for step in logs[layout]])
        print(f"| {layout} | {len(logs[layout])} | {middle:.2f} | {100 * error:.1f} |")
    served = []
    if FLAGS.requests:
        print(_SERVED_HEAD, flush=True)
        for layout, engine in engines.items():
            for name, workload in WORKLOADS.items():
                row = serve(engine, device, models_costs[layout], workload)
                served.append({"layout": layout, "workload": name, **row})
                print(_served_line(served[-1]), flush=True)
    document = {
        "median_error": device.median_error,
        "layouts": found,
        "steps": len(fitted),
        "served": served,
    }
    print(json.dumps(document))


def make_engine(config: fkv.ModelConfig, settings: serving.ServingSettings) -> serving.Engine:
    """An engine of a model with random weights, with all its programs compiled."""
    from flax import nnx

    engine = serving.Engine(fkv.Decoder(config, rngs=nnx.Rngs(0)), settings=settings)
    engine.warm_up()
    return engine


def log_steps(engine: serving.Engine, step_costs: costs.StepCosts) -> list[LoggedStep]:
    """Steps of an engine that few requests, some, and as many as may be keep busy."""
    settings, log = engine.settings, []

    def watch(plan: serving.StepPlan, seconds: float) -> None:
        work = step_work(step_costs, plan, engine.runner.shapes, settings.page_size)
        log.append(LoggedStep(work, seconds))

    engine.watch = watch
    rng, numbers = np.random.default_rng(0), itertools.count()
    most = settings.max_num_seqs
    for clients, share in ((1, 1 / 4), (-(-most // 4), 1 / 2), (most, 1)):
        while len(log) < share * FLAGS.steps:
            while engine.unfinished < clients:
                _add(engine, rng, str(next(numbers)))
            engine.step()
        for name in engine.names:
            engine.abort(name)
    engine.watch = None
    return log


def serve(
    engine: serving.Engine,
    device: CalibratedDevice,
    step_costs: costs.StepCosts,
    workload: LengthMix,
) -> dict[str, float]:
    """The same requests by the simulator and by the engine: percentiles of both, in seconds."""
    predicted = simulated(engine, device, step_costs, workload, math.inf)
    rate = _LOAD * predicted.request_rate
    predicted = simulated(engine, device, step_costs, workload, rate)
    measured = summarize(replay(engine, requests(engine, workload, rate)))
    row = {"rate": rate}
    for figure in ("ttft", "tpot"):
        for of, summary in (("simulated", predicted), ("measured", measured)):
            p50, _, p99 = getattr(summary, figure)
            row |= {f"{figure}_p50_{of}": p50, f"{figure}_p99_{of}": p99}
    return row


def simulated(
    engine: serving.Engine,
    device: CalibratedDevice,
    step_costs: costs.StepCosts,
    workload: LengthMix,
    rate: float,
) -> Summary:
    """What the simulator says of a workload on an engine like this one."""
    settings = engine.settings
    scheduler = serving.Scheduler(
        engine.runner.form.memory(settings),
        settings.make_policy(),
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
    )
    return summarize(
        simulate(
            requests(engine, workload, rate),
            scheduler,
            lambda plan: device.step_seconds(step_costs, plan, settings.page_size),
        )
    )


def requests(engine: serving.Engine, workload: LengthMix, rate: float) -> list[serving.Request]:
    """Requests of a workload; they come by a Poisson process, or all at once."""
    rng, longest = np.random.default_rng(1), engine.max_model_len
    times = np.cumsum(rng.exponential(size=FLAGS.requests)) / rate
    made = []
    for number, seconds in enumerate(times.tolist()):
        prompt, output = (max(2, int(longest * rng.uniform(low, high))) for low, high in workload)
        tokens = rng.integers(0, engine.config.vocab_size, prompt).astype(np.int32)
        made.append(serving.Request(f"served-{number}", tokens, output, seconds))
    return made


_SERVED_HEAD = """
Simulated / measured, and how far off:

| layout | workload | requests/s | TTFT p50 ms | TTFT p99 ms | TPOT p50 ms | TPOT p99 ms |
| --- | --- | ---: | ---: | ---: | ---: | ---: |"""


def _served_line(row: dict[str, Any]) -> str:
    cells = [row["layout"], row["workload"], f"{row['rate']:.2f}"]
    for figure in ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99"):
        ours, true = (1e3 * row[f"{figure}_{of}"] for of in ("simulated", "measured"))
        cells.append(f"{ours:.1f} / {true:.1f} ({100 * (ours / true - 1):+.0f} %)")
    return f"| {' | '.join(cells)} |"


def _add(engine: serving.Engine, rng: np.random.Generator, name: str) -> None:
    """A request of any length: short ones are as likely as long ones."""
    longest = engine.max_model_len
    size = int(np.exp(rng.uniform(np.log(4), np.log(longest * 3 / 4))))
    output = int(np.exp(rng.uniform(np.log(2), np.log(longest / 4))))
    prompt = rng.integers(0, engine.config.vocab_size, size)
    params = fkv.SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    engine.add(prompt, params, request_id=name)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
