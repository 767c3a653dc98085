"""Fit the simulator's step times to steps of the real engine, on the device of this machine.

    python -m experiments.calibrate --preset=demo --layout=mha --layout=fusedkv
    python -m experiments.simulate --trace=TRACE --preset=demo \\
        --device=runs/calibrate/calibration.json

An engine of each layout, with random weights, serves mixed load in four rounds of the same steps,
some time apart. Of three steps two are fitted to, a coefficient for each kind of work and all
layouts together; the error is told of the third, beside that of guessing a step's seconds from its
own repeats, which no fit to work can be much below. In between it serves requests that come by a
Poisson process: chats, summaries and stories; the simulator then serves the same, with step times
fitted to the log and with those fitted to the steps that served them: a machine that changes its
pace from minute to minute shows in the first alone. Writes calibration.json into --output_dir, and
prints how far the simulator is off; the last line is a JSON document.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import flags

import fusedkv_jax as fkv
from experiments.common import cli
from fusedkv_jax import costs, presets, serving
from fusedkv_jax.serving.simulate import CalibratedDevice, Summary, replay, simulate, summarize
from fusedkv_jax.serving.simulate.calibration import Accuracy, LoggedStep, fit, step_work

if TYPE_CHECKING:  # --help runs no model
    from fusedkv_jax.serving.engine import Deltas

FLAGS = flags.FLAGS

_HELD_OUT = 3  # one step of so many is not fitted to, in no round
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
    flags.DEFINE_bool("async_scheduling", True, "Plan each step while the one before it runs.")
    flags.DEFINE_integer("steps", 2400, "Steps of each layout, a quarter in each round.", 120)
    flags.DEFINE_integer("requests", 100, "Requests of each workload that is served; 0: none.", 0)
    flags.DEFINE_string("output_dir", "runs/calibrate", "Where the results are written.")


def main() -> None:
    import jax

    folder = cli.check_output(FLAGS.output_dir, folder=True)
    names = "max_num_seqs", "max_num_batched_tokens", "page_size", "max_model_len"
    names += "cache_dtype", "async_scheduling"
    chosen: dict[str, Any] = {name: FLAGS[name].value for name in names}
    settings = serving.ServingSettings(memory="pages", **chosen)
    models = {layout: presets.get(FLAGS.preset, layout=layout) for layout in FLAGS.layout}
    cache_dtype = FLAGS.cache_dtype or models[FLAGS.layout[0]].dtype
    measured = {
        layout: Measured(
            make_engine(config, settings), costs.StepCosts.of(config, cache_dtype=cache_dtype)
        )
        for layout, config in models.items()
    }

    def device() -> CalibratedDevice:
        logs = [log for own in measured.values() for log in own.rounds]
        return CalibratedDevice(
            name=jax.devices()[0].device_kind,
            coefficients=fit([s for log in logs for i, s in enumerate(log) if i % _HELD_OUT]),
            shapes=settings.make_shapes(),
            cache_dtype=cache_dtype,
            memory=float(settings.cache_bytes(models[FLAGS.layout[0]])),
        )

    # Logged before, between and after what is served: a machine has fast and slow minutes.
    turns = [None, *WORKLOADS]
    for turn, workload in enumerate(turns):
        for layout, own in measured.items():
            if workload and FLAGS.requests:
                own.serve(
                    workload, _LOAD * own.simulated(device(), workload, math.inf).request_rate
                )
                print(f"{layout}: {workload} served", file=sys.stderr)
            own.rounds.append(own.log_steps(FLAGS.steps // len(turns), seed=turn))
    found = device()
    accuracy = Accuracy.of(found.coefficients, [own.held_out() for own in measured.values()])
    found = dataclasses.replace(
        found, median_error=accuracy.median_error, repeat_error=accuracy.repeat_error
    )
    found.write(folder / "calibration.json")
    print(json.dumps(accuracy._asdict() | report(measured, found)))


def report(measured: dict[str, Measured], device: CalibratedDevice) -> dict[str, Any]:
    """Print how far the simulator is off; the same as a document."""
    print("Median relative error of the seconds of steps that were not fitted to:\n")
    print("| layout | steps | median ms | fit % | own repeats % | fit, of a step's median % |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    found = {}
    for layout, own in measured.items():
        accuracy = Accuracy.of(device.coefficients, [own.held_out()])
        log = [step for each in own.rounds for step in each]
        cells = [layout, str(len(log)), f"{1e3 * np.median([s.seconds for s in log]):.2f}"]
        print(f"| {' | '.join(cells + [f'{100 * error:.1f}' for error in accuracy])} |")
        found[layout] = accuracy._asdict()
    served = [
        {"layout": layout, "workload": workload, "fitted_to": which} | own.compare(by, workload)
        for layout, own in measured.items()
        for workload, run in own.served.items()
        for which, by in (
            ("the log", device),
            ("its steps", dataclasses.replace(device, coefficients=fit(run.log))),
        )
    ]
    if served:
        print(_SERVED_HEAD, *map(_served_line, served), sep="\n")
    steps = sum(len(log) for own in measured.values() for log in own.rounds)
    return {"layouts": found, "steps": steps, "served": served}


def make_engine(config: fkv.ModelConfig, settings: serving.ServingSettings) -> serving.Engine:
    """An engine of a model with random weights, with all its programs compiled."""
    from flax import nnx

    engine = serving.Engine(fkv.Decoder(config, rngs=nnx.Rngs(0)), settings=settings)
    engine.warm_up()
    return engine


class Served(NamedTuple):
    """What an engine made of a workload.

    Attributes:
        rate: requests a second.
        summary: what those who asked have seen.
        log: the steps that it took.
    """

    rate: float
    summary: Summary
    log: list[LoggedStep]


@dataclasses.dataclass
class Measured:
    """An engine, and what was measured of it.

    Attributes:
        engine: with all its programs compiled.
        costs: of its model's steps.
        rounds: logs of the same steps.
        served: what the engine made of each workload.
    """

    engine: serving.Engine
    costs: costs.StepCosts
    rounds: list[list[LoggedStep]] = dataclasses.field(default_factory=list)
    served: dict[str, Served] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def logging(self) -> Iterator[list[LoggedStep]]:
        """A list that gets each step of the engine, with what nobody does beside it."""
        engine, log = self.engine, []
        works: deque[tuple[float, ...]] = deque()  # of steps that have been planned, in order
        seconds = 0.0

        def watch(plan: serving.StepPlan) -> None:
            shapes, page_size = engine.runner.shapes, engine.settings.page_size
            works.append(step_work(self.costs, plan, shapes, page_size))

        run = engine.step
        run()  # ends a step whose requests were aborted

        def step() -> Deltas:
            nonlocal seconds
            before, start = engine.stats().steps, time.monotonic()
            deltas = run()
            seconds += time.monotonic() - start
            if ended := engine.stats().steps - before:
                log.extend(LoggedStep(works.popleft(), seconds / ended) for _ in range(ended))
                seconds = 0.0
            return deltas

        engine.watch, engine.step = watch, step
        try:
            yield log
        finally:
            engine.watch, engine.step = None, run

    def held_out(self) -> list[list[LoggedStep]]:
        """The steps of each round that are not fitted to."""
        return [log[::_HELD_OUT] for log in self.rounds]

    def log_steps(self, count: int, seed: int) -> list[LoggedStep]:
        """So many steps, a share with each number of clients for which there is a program.

        They are the same steps whatever the seed, with other tokens: no prefix is found again.
        """
        engine = self.engine
        lengths, tokens = np.random.default_rng(0), np.random.default_rng([1, seed])
        numbers = itertools.count()
        clients = engine.runner.shapes.decode_rows
        with self.logging() as log:
            for turn, most in enumerate(clients, 1):
                while len(log) < count * turn / len(clients):
                    while engine.unfinished < most:
                        _add(engine, lengths, tokens, str(next(numbers)))
                    engine.step()
                for name in engine.names:
                    engine.abort(name)
        return log

    def serve(self, workload: str, rate: float) -> None:
        """Serve its requests, so many a second."""
        with self.logging() as log:
            records = replay(self.engine, requests(self.engine, WORKLOADS[workload], rate))
        self.served[workload] = Served(rate, summarize(records), log)

    def simulated(self, device: CalibratedDevice, workload: str, rate: float) -> Summary:
        """What the simulator says of a workload on an engine like this one."""
        settings = self.engine.settings
        scheduler = serving.Scheduler(
            self.engine.runner.form.memory(settings),
            settings.make_policy(),
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
        )
        return summarize(
            simulate(
                requests(self.engine, WORKLOADS[workload], rate),
                scheduler,
                lambda plan: device.step_seconds(self.costs, plan, settings.page_size),
                overlaps=settings.async_scheduling,
            )
        )

    def compare(self, device: CalibratedDevice, workload: str) -> dict[str, float]:
        """What simulator and engine made of the same requests: percentiles, in seconds."""
        rate, measured, _ = self.served[workload]
        predicted = self.simulated(device, workload, rate)
        row = {"rate": rate}
        for figure in ("ttft", "tpot"):
            for of, summary in (("simulated", predicted), ("measured", measured)):
                p50, _, p99 = getattr(summary, figure)
                row |= {f"{figure}_p50_{of}": p50, f"{figure}_p99_{of}": p99}
        return row


def requests(engine: serving.Engine, mix: LengthMix, rate: float) -> list[serving.Request]:
    """Requests of a mix; they come by a Poisson process, or all at once."""
    rng, longest = np.random.default_rng(1), engine.max_model_len
    times = np.cumsum(rng.exponential(size=FLAGS.requests)) / rate
    made = []
    for number, seconds in enumerate(times.tolist()):
        prompt, output = (max(2, int(longest * rng.uniform(low, high))) for low, high in mix)
        tokens = rng.integers(0, engine.config.vocab_size, prompt).astype(np.int32)
        made.append(serving.Request(f"served-{number}", tokens, output, seconds))
    return made


_SERVED_HEAD = """
Simulated / measured, and how far off:

| layout | workload | fitted to | per s | TTFT p50 ms | TTFT p99 ms | TPOT p50 ms | TPOT p99 ms |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"""


def _served_line(row: dict[str, Any]) -> str:
    cells = [row["layout"], row["workload"], row["fitted_to"], f"{row['rate']:.2f}"]
    for figure in ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99"):
        ours, true = (1e3 * row[f"{figure}_{of}"] for of in ("simulated", "measured"))
        cells.append(f"{ours:.1f} / {true:.1f} ({100 * (ours / true - 1):+.0f} %)")
    return f"| {' | '.join(cells)} |"


def _add(
    engine: serving.Engine, rng: np.random.Generator, tokens: np.random.Generator, name: str
) -> None:
    """A request of any length: short ones are as likely as long ones."""
    longest = engine.max_model_len
    size = int(np.exp(rng.uniform(np.log(4), np.log(longest * 3 / 4))))
    output = int(np.exp(rng.uniform(np.log(2), np.log(longest / 4))))
    prompt = tokens.integers(0, engine.config.vocab_size, size)
    params = fkv.SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    engine.add(prompt, params, request_id=name)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
