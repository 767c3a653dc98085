"""Fit the simulator's step times to steps of the real engine, on the device of this machine.

    python -m experiments.calibrate --preset=demo --layout=mha --layout=fusedkv
    python -m experiments.simulate --trace=TRACE --preset=demo \\
        --device=runs/calibrate/calibration.json

An engine of each layout, with random weights, serves mixed load. Of three steps two are fitted to,
a coefficient for each kind of work and all layouts together; the error is told of the third. Writes
calibration.json into --output_dir; the last line is a JSON document.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
from absl import flags

import fusedkv_jax as fkv
from experiments.common import cli
from fusedkv_jax import costs, presets, serving
from fusedkv_jax.serving.simulate import CalibratedDevice
from fusedkv_jax.serving.simulate.calibration import LoggedStep, errors, fit, step_work

FLAGS = flags.FLAGS

_HELD_OUT = 3  # one step of so many is not fitted to


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_string("preset", "demo", f"Model size: {', '.join(presets.names())}.")
    flags.DEFINE_multi_string("layout", ["mha", "fusedkv"], "Layout; may be repeated.")
    flags.DEFINE_string("cache_dtype", "bfloat16", "Storage type of the cache.")
    flags.DEFINE_integer("max_num_seqs", 16, "Requests in a step.", 1)
    flags.DEFINE_integer("max_num_batched_tokens", 256, "Tokens in a step.", 1)
    flags.DEFINE_integer("page_size", 16, "Tokens of a page.", 1)
    flags.DEFINE_integer("max_model_len", None, "Tokens of a request; default the model's.", 16)
    flags.DEFINE_integer("steps", 600, "Steps of each layout.", 30)
    flags.DEFINE_string("output_dir", "runs/calibrate", "Where the results are written.")


def main() -> None:
    import jax

    folder = cli.check_output(FLAGS.output_dir, folder=True)
    names = ("max_num_seqs", "max_num_batched_tokens", "page_size", "max_model_len", "cache_dtype")
    chosen: dict[str, Any] = {name: FLAGS[name].value for name in names}
    settings = serving.ServingSettings(memory="pages", **chosen)
    logs = {layout: log_steps(layout, settings) for layout in FLAGS.layout}
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
        memory=float(settings.cache_bytes(presets.get(FLAGS.preset, layout=FLAGS.layout[0]))),
        median_error=float(np.median(errors(coefficients, everything))),
    )
    device.write(folder / "calibration.json")
    print(f"| layout | steps | median ms | median error %, of {len(everything)} held-out steps |")
    print("| --- | ---: | ---: | ---: |")
    for layout, error in found.items():
        middle = 1e3 * np.median([step.seconds for step in logs[layout]])
        print(f"| {layout} | {len(logs[layout])} | {middle:.2f} | {100 * error:.1f} |")
    print(json.dumps({"median_error": device.median_error, "layouts": found, "steps": len(fitted)}))


def log_steps(layout: str, settings: serving.ServingSettings) -> list[LoggedStep]:
    """Steps of an engine that few requests, some, and as many as may be keep busy."""
    config = presets.get(FLAGS.preset, layout=layout)
    step_costs = costs.StepCosts.of(config, cache_dtype=FLAGS.cache_dtype)
    from flax import nnx

    engine = serving.Engine(fkv.Decoder(config, rngs=nnx.Rngs(0)), settings=settings)
    engine.warm_up()
    log: list[LoggedStep] = []

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
    return log


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
