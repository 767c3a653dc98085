"""Compile the training step, prefill and decoding for a TPU slice, ahead of time.

    python -m experiments.compile_for_tpu --topology=v5p:8x8x8 --preset=4b
    python -m experiments.compile_for_tpu --topology=v5e:16x16 --preset=1_5b --layout=mha --search
    python -m experiments.compile_for_tpu --topology=v6e:4x4 --config=MINE.py --programs=train

Says what each device holds, computes and sends, and whether it fits, by the real compiler (libtpu,
from `pip install 'jax[tpu]'`), on a CPU. Times are the least that arithmetic allows: nothing is
run. A preset takes the paper's batch of 4.2M tokens; its mesh, rematerialization and accumulation
are those that a formula expects most of, unless --config.FIELD=VALUE sets one of them. --search
compiles the best few by that formula and reports the fastest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.common import cli
from experiments.common.documents import Document
from experiments.common.overrides import apply_overrides
from experiments.common.paper import inference, paper_run
from fusedkv_jax import compile_ahead as ahead
from fusedkv_jax import presets
from fusedkv_jax.compile_ahead.chips import SHAPES, Slice
from fusedkv_jax.mesh import AXES
from fusedkv_jax.training import ExperimentConfig

PROGRAMS = ("train", "prefill", "decode")
_SEARCHED = ("mesh.", "model.remat=", "train.grad_accumulation=")

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags of this binary."""
    flags.DEFINE_string(
        "topology", None, "The slice: " + "; ".join(x.choices(name) for name, x in SHAPES.items())
    )
    flags.DEFINE_string(
        "preset", None, f"The paper's run of a model of this size: {', '.join(presets.names())}."
    )
    flags.DEFINE_string("layout", "fusedkv", "Layout of the preset.")
    flags.DEFINE_list("programs", list(PROGRAMS), "What to compile.")
    flags.DEFINE_bool(
        "search", False, "Look for the mesh, remat policy and accumulation of the fastest step."
    )
    flags.DEFINE_integer("trials", 3, "Settings that fit after which --search stops.", 1)
    flags.DEFINE_integer(
        "rows", None, "Sequences that prefill and decoding process; by default one a device.", 1
    )
    flags.DEFINE_integer(
        "length", 8192, "Tokens of each prompt, and of each row of the cache while decoding.", 1
    )
    flags.DEFINE_integer(
        "tensor",
        1,
        "Parts of the model in prefill and decoding; rows are over the other devices.",
        1,
    )
    flags.DEFINE_string("json", None, "Also write the reports to this file.")
    cli.define_config()
    cli.only_with("layout", preset=True)
    cli.only_with("trials", search=True)


def experiment(place: Slice, devices: Sequence[Any]) -> ExperimentConfig:
    """What --preset or --config, and the overrides, ask for."""
    if FLAGS.preset is None:
        return cli.load_config()
    if FLAGS.config:
        raise ValueError("--preset and --config both name a model; give one of them")
    config = apply_overrides(paper_run(FLAGS.preset, FLAGS.layout), FLAGS.override)
    chosen = [name for name in FLAGS.override if name.startswith(_SEARCHED)]
    return config if chosen else ahead.search.candidates(config, place, devices)[0].apply(config)


def _train(
    config: ExperimentConfig, place: Slice, devices: Sequence[Any]
) -> tuple[ahead.report.Report, list[str]]:
    if not FLAGS.search:
        from fusedkv_jax.sharding import make_mesh

        program = ahead.programs.train(config, make_mesh(config.mesh, devices))
        return ahead.report.make_report(program, place), []
    trials = ahead.search.search(
        config,
        place,
        devices,
        wanted=FLAGS.trials,
        progress=lambda trial: print(
            ahead.text.describe_trials([trial]).splitlines()[1], flush=True
        ),
    )
    best = trials[0]
    if best.report is None:
        raise ahead.report.DoesNotFit(
            f"no settings fit {place.name}; of those tried, {best.candidate} lacks the least: "
            f"{best.missing:,} bytes ({ahead.report.gib(best.missing)}) a device; "
            "take a larger slice",
            best.missing,
        )
    print(f"tried, the fastest first\n{ahead.text.describe_trials(trials)}\n")
    print(f"the fastest: {' '.join(_as_flags(best.candidate))}\n")
    return best.report, [str(trial.candidate) for trial in trials]


def _settings(config: ExperimentConfig, place: Slice) -> str:
    sizes = zip(AXES, config.mesh.sizes(config.mesh.devices or place.devices), strict=True)
    mesh = " x ".join(f"{axis}={size}" for axis, size in sizes)
    return (
        f"train: {config.data.batch_size} x {config.data.seq_len} tokens in "
        f"{config.train.grad_accumulation} microbatches, mesh {mesh}, remat {config.model.remat}"
    )


def _as_flags(best: ahead.search.Candidate) -> list[str]:
    mesh = {f"mesh.{axis}": getattr(best.mesh, axis) for axis in AXES}
    settings = mesh | {
        "model.remat": best.remat,
        "train.grad_accumulation": best.grad_accumulation,
    }
    return [f"--config.{name}={value}" for name, value in settings.items()]


def main() -> None:
    place = Slice.parse(cli.require("topology"))
    unknown = set(FLAGS.programs) - set(PROGRAMS)
    if unknown:
        raise ValueError(f"--programs={unknown.pop()} is unknown; choose {', '.join(PROGRAMS)}")
    output = FLAGS.json and cli.check_output(FLAGS.json)
    from pallas_kernels.tpu.topology import slice_devices

    try:
        devices = slice_devices(place.name)
    except NotImplementedError as error:
        raise ValueError(str(error)) from None
    config = experiment(place, devices)
    layout = config.model.to_dict()["layout"]
    print(f"{config.name}, {layout}, on {ahead.text.describe_slice(place)}\n")
    if "train" in FLAGS.programs:
        print(f"{_settings(config, place)}\n", flush=True)
    reports: list[Document] = []
    tried: list[str] = []
    for name in FLAGS.programs:
        if name == "train":
            made, tried = _train(config, place, devices)
        else:
            sizes = {"tensor": FLAGS.tensor, "rows": FLAGS.rows, "length": FLAGS.length}
            made = ahead.report.make_report(inference(name, config.model, devices, **sizes), place)
        print(ahead.text.describe(made) + "\n", flush=True)
        reports.append(made.to_dict())
    document = {"topology": place.name, "name": config.name, "tried": tried, "reports": reports}
    if output:
        output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    define_flags()
    cli.run(main, keep_programs=False)
