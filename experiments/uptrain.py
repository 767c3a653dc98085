"""How much training a converted model needs: python -m experiments.uptrain --init_from=MODEL.

For each of --layouts: the loss on held-out text of the model whose projections were dropped, of
the one that was fitted by least squares, and of that one against tokens of training, by
distillation from the original or on the text alone. OUTPUT.md, OUTPUT.json and OUTPUT.png are
written after every layout. Finished runs are skipped and a run that was cut off goes on, so the
same command continues after an interruption. The last line on standard output is the JSON document.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
import sys
from typing import Any

from absl import flags

import fusedkv_jax as fkv
from experiments.common import cli, models, pictures, runs
from experiments.common.documents import Document
from fusedkv_jax import costs, processes, training
from fusedkv_jax.training import DistillationConfig, ExperimentConfig

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a training: what the model learns from, and for which share of the steps."""

    name: str
    distillation: DistillationConfig
    share: float = 1.0


_LOGITS = DistillationConfig(logits=1.0)
# What is trained after the fit, by the name of its curve; each stage starts where the last ended.
OBJECTIVES = {
    "text": (Stage("text", DistillationConfig()),),
    "distillation": (Stage("logits", _LOGITS),),
    "stages": (
        Stage("hidden states", DistillationConfig(hidden=1.0), share=0.25),
        Stage("logits", _LOGITS, share=0.75),
    ),
}
_WITHIN = (0.02, 0.01)  # shares of the original's loss


def define_flags() -> None:
    """Define the flags."""
    cli.define_config("demo")
    flags.DEFINE_string(
        "init_from",
        None,
        "The original: a run's directory, a Hugging Face folder, or a .gguf file, of a layout in "
        "which every layer has its own keys and values.",
    )
    flags.DEFINE_list("layouts", ["fusedkv", "cla", "yoco"], "Layouts, separated by commas.")
    flags.DEFINE_list(
        "objectives",
        ["stages", "text"],
        "What is learned from after the fit: text; distillation, the original's next-token "
        "distributions; stages, its hidden states after every layer in the first quarter of the "
        "steps, then distillation; or none, for no training.",
    )
    flags.DEFINE_integer(
        "fit_tokens", 16384, "Tokens of the training text that models are fitted on.", lower_bound=1
    )
    flags.DEFINE_string("workdir", "runs/uptrain", "Directory that holds all runs.")
    flags.DEFINE_string(
        "output", None, "OUTPUT.md, OUTPUT.json and OUTPUT.png; by default WORKDIR/table."
    )


def main() -> int:
    workdir = pathlib.Path(cli.require("workdir")).expanduser()
    output = FLAGS.output or str(workdir / "table")
    results_file = cli.check_results_file(pathlib.Path(f"{output}.json"))
    table_file, picture = (cli.check_output(f"{output}.{end}") for end in ("md", "png"))
    start = models.Start(cli.require("init_from"), workdir / "init_from")
    config = start.settle(cli.load_config(start.change))
    _check(config, start)
    original = start.original()
    objectives = [name for name in FLAGS.objectives if name != "none"]
    results: Document = {
        "experiment": "uptrain",
        "original": {
            "parameters": costs.parameter_count(original.config),
            "cache_bytes_per_token": costs.cache_bytes_per_token(
                original.config, original.config.dtype
            ),
            "loss": _held_out_loss(original, config),
        },
        "fit_tokens": FLAGS.fit_tokens,
        "train_tokens": config.train.steps * _batch_tokens(config) if objectives else 0,
        "rows": [],
        "environment": processes.environment(),
        "command": shlex.join(["python", "-m", "experiments.uptrain", *sys.argv[1:]]),
    }
    try:
        for layout in FLAGS.layouts:
            row = _row(config, layout, start, original, workdir, objectives)
            results["rows"].append(row)
            table_file.write_text(markdown(results), encoding="utf-8")
            results_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            if objectives:
                pictures.draw_losses_by_tokens(
                    _curves(results), results["original"]["loss"], picture
                )
    except runs.Interrupted as stop:
        print(stop, file=sys.stderr)
        return training.INTERRUPTED_EXIT_CODE
    print(markdown(results))
    print(json.dumps(results))
    return 0


def _check(config: ExperimentConfig, start: models.Start) -> None:
    from fusedkv_jax.interop import uptrain  # imports JAX, for which --help does not wait

    for layout in FLAGS.layouts:
        try:
            uptrain.fitted_config(start.config, layout)
        except ValueError as error:
            raise ValueError(f"--layouts={layout}: {error}") from None
    if FLAGS.objectives == ["none"]:
        return
    for name in FLAGS.objectives:
        if name not in OBJECTIVES:
            raise ValueError(f"--objectives={name}; choose {', '.join(OBJECTIVES)}, or none alone")
        if config.train.steps < len(OBJECTIVES[name]):
            raise ValueError(
                f"--config.train.steps={config.train.steps} are fewer than the parts of "
                f"--objectives={name}; use {len(OBJECTIVES[name])} or more"
            )


def _row(
    config: ExperimentConfig,
    layout: str,
    start: models.Start,
    original: fkv.Decoder,
    workdir: pathlib.Path,
    objectives: list[str],
) -> dict[str, Any]:
    """One layout: losses before training, and the curve of each objective."""
    config = dataclasses.replace(config, model=config.model.replace(layout=layout))
    folder = workdir / layout.replace(":", "_").replace("=", "")
    model = _fitted(config, start, folder / "fitted")
    losses = {
        "dropped": _held_out_loss(start.load(config.model), config),
        "fitted": _held_out_loss(model, config),
    }
    print(f"{layout}: {losses}", flush=True)
    trained = {name: _train(config, name, model, original, folder / name) for name in objectives}
    return {
        "layout": layout,
        "cache_bytes_per_token": costs.cache_bytes_per_token(config.model, config.model.dtype),
        **losses,
        "curves": {
            name: [[0, losses["fitted"]], *(point for stage in stages.values() for point in stage)]
            for name, stages in trained.items()
        },
        "stages": {
            name: {stage: points[-1][1] for stage, points in stages.items()}
            for name, stages in trained.items()
        },
    }


def _fitted(config: ExperimentConfig, start: models.Start, folder: pathlib.Path) -> fkv.Decoder:
    """The model fitted by least squares, or as an earlier call fitted it."""
    # What it depends on; how it is trained afterwards may change.
    fit = ExperimentConfig(
        name=f"{start.path}, fitted to {FLAGS.fit_tokens} tokens",
        model=config.model,
        data=config.data,
    )
    if models.is_run(str(folder)):
        found = models.load_run(str(folder))
        runs.check_same(found.config.to_dict(), fit, folder)
        return found.model
    print(f"{config.model.kv_layout.spec}: fitting to {FLAGS.fit_tokens:,} tokens", flush=True)
    model = start.load(config.model, models.training_tokens(config.data, FLAGS.fit_tokens))
    training.save_model(model, fit, folder)
    return model


def _train(
    config: ExperimentConfig,
    objective: str,
    model: fkv.Decoder,
    original: fkv.Decoder,
    folder: pathlib.Path,
) -> dict[str, list[list[float]]]:
    """Train by an objective; held-out losses [tokens so far, loss] of each of its stages."""
    found, done, stages = {}, 0, OBJECTIVES[objective]
    for number, stage in enumerate(stages):
        left = config.train.steps - done
        steps = left if stage is stages[-1] else max(1, round(stage.share * config.train.steps))
        run = dataclasses.replace(
            config,
            name=f"{config.model.kv_layout.spec}, {objective}, {stage.name}",
            distillation=stage.distillation,
            train=dataclasses.replace(config.train, steps=steps),
            data=dataclasses.replace(config.data, seed=config.data.seed + number),  # other text
        )
        finished = runs.complete(
            run,
            folder / stage.name.replace(" ", "_"),
            initial=lambda model=model: model,
            teacher=original if run.distillation.is_on else None,
        )
        evaluated = [line for line in finished.history if line.get("eval/loss") is not None]
        found[stage.name] = [
            [(done + line["step"]) * _batch_tokens(run), line["eval/loss"]] for line in evaluated
        ]
        done += steps
        if stage is not stages[-1]:
            model = models.load_run(str(finished.workdir)).model
    return found


def _batch_tokens(config: ExperimentConfig) -> int:
    return config.data.batch_size * config.data.seq_len


def _held_out_loss(model: fkv.Decoder, config: ExperimentConfig) -> float:
    from flax import nnx

    from fusedkv_jax import data

    graphdef, params = nnx.split(model, nnx.Param)
    batches = data.make_eval_batches(config.data, config.train.eval_batches)
    found = training.evaluate(training.make_eval_step(graphdef), params, batches)
    return found.metrics["loss"]


def _curves(results: dict[str, Any]) -> dict[str, list[list[float]]]:
    return {
        f"{row['layout']}, {name}": curve
        for row in results["rows"]
        for name, curve in row["curves"].items()
    }


def markdown(results: dict[str, Any]) -> str:
    """The results as a Markdown document."""
    original, environment = results["original"], results["environment"]
    loss, within = original["loss"], " | ".join(f"within {share:.0%}" for share in _WITHIN)
    trained = (
        f". Then come {results['train_tokens']:,} tokens of training. The last columns are the "
        "tokens after which the loss is within that share of the original's."
        if any(row["curves"] for row in results["rows"])
        else ". Nothing was trained."
    )
    lines = [
        "# Uptraining",
        "",
        f"A model of {original['parameters']:,} parameters and a held-out loss of {loss:.4f} nats "
        "per token, under layouts of less cache: without the projections that have no place, and "
        f"fitted by least squares to {results['fit_tokens']:,} tokens{trained}",
        "",
        f"| layout | cache | dropped | fitted | after training on | {within} |",
        "|---|---:|---:|---:|---|" + "---:|" * len(_WITHIN),
    ]
    for row in results["rows"]:
        cache = row["cache_bytes_per_token"] / original["cache_bytes_per_token"]
        starts = f"| {row['layout']} | {cache:.0%} | {row['dropped']:.3f} | {row['fitted']:.3f} |"
        if not row["curves"]:
            lines.append(f"{starts} |" + " |" * len(_WITHIN))
        for name, curve in row["curves"].items():
            after = ", then ".join(f"{s} {value:.4f}" for s, value in row["stages"][name].items())
            needed = [_tokens_until(curve, loss * (1 + share)) for share in _WITHIN]
            gap = f"{curve[-1][1] / loss - 1:+.1%}"
            lines.append(f"{starts} {after} ({gap}) | {' | '.join(needed)} |")
    versions = ("python", "jax", "jaxlib", "flax", "optax", "fusedkv_jax")
    lines += [
        "",
        f"Device: {environment['devices']} x {environment['device']} ({environment['processor']}, "
        f"{environment['cores']} cores). Versions: "
        f"{', '.join(f'{name} {environment[name]}' for name in versions)}. One run each.",
        "",
        f"Command: `{results['command']}`",
        "",
    ]
    return "\n".join(lines)


def _tokens_until(curve: list[list[float]], loss: float) -> str:
    found = next((tokens for tokens, value in curve if value <= loss), None)
    return "not reached" if found is None else f"{found:,.0f}"


# Not at import: other binaries have flags of the same names, and tests import several.
if __name__ == "__main__":
    define_flags()
    cli.run(main)
