"""Reproduce the claim at a small size, or a study: python -m experiments.reproduce [--study=NAME].

Without --study it trains every layout of experiments/configs/claim_small.py, or those of --layouts,
with every seed on the same tokens, and writes a table of held-out losses in Markdown and JSON.
Finished runs are skipped and a run that was cut off goes on, so the same command continues after an
interruption. The last line on standard output is the JSON document. `experiments.study.command` has
what --study does.
"""

import dataclasses
import json
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import TypeVar

from absl import flags

from experiments.common import cli, runs
from experiments.common.documents import Document
from experiments.configs import claim_small
from experiments.study import command
from fusedkv_jax import costs, processes, training
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.training import ExperimentConfig

FLAGS = flags.FLAGS
T = TypeVar("T")


def run_config(config: ExperimentConfig, name: str, seed: int) -> ExperimentConfig:
    """The configuration of one row and seed; the seed draws parameters and order of the data.

    Raises:
      ValueError: the row does not fit the model.
    """
    return dataclasses.replace(
        config,
        name=f"{config.name} {name} seed {seed}",
        model=claim_small.row(name).apply(config.model),
        data=dataclasses.replace(config.data, seed=seed),
        train=dataclasses.replace(config.train, seed=seed),
    )


def reproduce(
    config: ExperimentConfig, workdir: pathlib.Path, names: Sequence[str], seeds: Sequence[int]
) -> Document:
    """Complete all runs; returns the results.

    Args:
      config: what all runs have in common.
      workdir: holds the directory NAME/seed_SEED of each run.
      names: of rows, as for `claim_small.row`; the first is what the others are compared with.
      seeds: at least one.

    Raises:
      ValueError: a row does not fit the model, and what `runs.complete` raises.
      runs.Interrupted: a signal ended a run.
    """
    import jax

    plan = {(name, seed): run_config(config, name, seed) for seed in seeds for name in names}
    losses: dict[str, dict[int, float]] = {name: {} for name in names}
    for number, ((name, seed), run) in enumerate(plan.items(), 1):
        finished = runs.complete(run, workdir / name / f"seed_{seed}")
        losses[name][seed] = finished.bits_per_byte
        how = "finished before" if finished.was_finished else f"{finished.seconds:.0f} s"
        print(
            f"run {number} of {len(plan)}: {name}, seed {seed}: "
            f"{finished.bits_per_byte:.4f} bits per byte ({how})",
            flush=True,
        )
        jax.clear_caches()  # the programs of one run are of no use to the next
    return {
        "experiment": config.name,
        "steps": config.train.steps,
        "train_tokens": config.train.steps * config.data.batch_size * config.data.seq_len,
        "seeds": list(seeds),
        "environment": processes.environment(),
        "rows": [_row(config, name, names[0], losses) for name in names],
    }


def _row(
    config: ExperimentConfig, name: str, first: str, losses: dict[str, dict[int, float]]
) -> Document:
    from experiments.study.statistics import Estimate

    model = claim_small.row(name).apply(config.model)
    own = losses[name]
    # Runs of one seed see the same batches, so their difference varies less than either.
    loss = Estimate.of(list(own.values()))
    difference = Estimate.of([own[seed] - losses[first][seed] for seed in own])
    return {
        "name": name,
        "layout": claim_small.row(name).layout,
        "num_kv_heads": model.kv_heads,
        "parameters": costs.parameter_count(model),
        "cache_bytes_per_token": costs.cache_bytes_per_token(model, model.dtype),
        "bits_per_byte": {str(seed): loss for seed, loss in own.items()},
        "mean": loss.mean,
        "half_width": loss.half_width,
        "min": min(own.values()),
        "max": max(own.values()),
        "difference_mean": difference.mean,
        "difference_half_width": difference.half_width,
    }


def markdown(results: Document) -> str:
    """The results as a Markdown document."""
    environment, first = results["environment"], results["rows"][0]["name"]
    versions = ("python", "jax", "jaxlib", "flax", "optax", "fusedkv_jax")
    lines = [
        f"# {results['experiment']}",
        "",
        f"{results['train_tokens']:,} tokens of training in {results['steps']:,} steps for each "
        f"run, seeds {', '.join(map(str, results['seeds']))}. Loss on held-out text in bits per "
        f"byte, mean over the seeds ± half of its 95% confidence interval by Student's t; the "
        f"difference to {first} is that of runs with the same seed, **bold** where its interval "
        "excludes zero.",
        "",
        f"| layout | parameters | cache, bytes per token | loss | min to max | minus {first} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        difference = "" if row["name"] == first else _difference(row)
        lines.append(
            f"| {row['name']} | {row['parameters']:,} | {row['cache_bytes_per_token']:,} "
            f"| {_interval(row['mean'], row['half_width'])} "
            f"| {row['min']:.4f} to {row['max']:.4f} | {difference} |"
        )
    lines += [
        "",
        f"Device: {environment['devices']} x {environment['device']} "
        f"({environment['processor']}, {environment['cores']} cores). "
        f"Versions: {', '.join(f'{name} {environment[name]}' for name in versions)}.",
        "",
        f"Command: `{results['command']}`",
        "",
    ]
    return "\n".join(lines)


def _interval(mean: float, half_width: float | None, sign: str = "") -> str:
    """A mean, and how far its interval goes; a single run has none."""
    return f"{mean:{sign}.4f}" + ("" if half_width is None else f" ± {half_width:.4f}")


def _difference(row: Document) -> str:
    mean, half_width = row["difference_mean"], row["difference_half_width"]
    text = _interval(mean, half_width, "+")
    return f"**{text}**" if half_width is not None and abs(mean) > half_width else text


def read_names(names: Sequence[str], model: ModelConfig) -> list[str]:
    """The rows that --layouts names; those of `claim_small.ROWS` without names.

    Raises:
      ValueError: a name that is repeated, unknown, or of a row that does not fit the model.
    """
    for name in names:
        try:
            claim_small.row(name).apply(model)
        except ValueError as error:
            raise ValueError(f"--layouts={name}: {error}") from None
    return _without_repeats("layouts", names) or list(claim_small.ROWS)


def read_seeds(texts: Sequence[str]) -> list[int]:
    """The seeds of --seeds.

    Raises:
      ValueError: none, one that is not a number, or one that is repeated.
    """
    if not all(text.isdecimal() for text in texts) or not texts:
        raise ValueError(f"--seeds={','.join(texts)}; give numbers such as --seeds=0,1,2")
    return _without_repeats("seeds", [int(text) for text in texts])


def places(workdir: str | None, output: str | None) -> tuple[pathlib.Path, pathlib.Path]:
    """Where the runs and the table go; by default the table beside the runs, over no other one."""
    folder = pathlib.Path(workdir or "runs/claim_small")
    return folder, pathlib.Path(output or folder / "table")


def _without_repeats(flag: str, values: Sequence[T]) -> list[T]:
    for value in values:
        if list(values).count(value) > 1:
            raise ValueError(f"--{flag} names {value} twice; name it once")
    return list(values)


def _check_overrides(overrides: Sequence[str]) -> None:
    """Refuse what the rows and seeds would silently replace."""
    owners = {
        "model.layout": "layouts",
        "model.num_kv_heads": "layouts",
        "train.seed": "seeds",
        "data.seed": "seeds",
    }
    for override in overrides:
        field = override.partition("=")[0]
        if field in owners:
            raise ValueError(f"--config.{field} is set by --{owners[field]} here; use that flag")


def define_flags() -> None:
    """Define the flags."""
    cli.define_config("claim_small")
    flags.DEFINE_string(
        "workdir", None, "Directory that holds all runs; by default runs/claim_small or runs/STUDY."
    )
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, separated by commas.")
    flags.DEFINE_list(
        "layouts",
        [],
        f"Rows to train, by default {', '.join(claim_small.ROWS)}; any layout is one too, as for "
        "experiments.describe. With --study rows of the study.",
    )
    flags.DEFINE_string(
        "output",
        None,
        "Where the table goes: OUTPUT.md and OUTPUT.json, by default WORKDIR/table; with --study "
        "the folder of its records and tables, by default WORKDIR/results.",
    )
    command.define_flags()


def main() -> int:
    if FLAGS.study is not None:
        return command.main()
    seeds = read_seeds(FLAGS.seeds)
    _check_overrides(FLAGS.override)
    config, (workdir, output) = cli.load_config(), places(FLAGS.workdir, FLAGS.output)
    names = read_names(FLAGS.layouts, config.model)
    results_file = cli.check_results_file(pathlib.Path(f"{output}.json"))
    table_file = cli.check_output(f"{output}.md")
    try:
        results = reproduce(config, workdir, names, seeds)
    except runs.Interrupted as stop:
        print(stop, file=sys.stderr)
        return training.INTERRUPTED_EXIT_CODE
    results["command"] = shlex.join(["python", "-m", "experiments.reproduce", *sys.argv[1:]])
    text = markdown(results)
    table_file.write_text(text, encoding="utf-8")
    data = json.dumps(results, indent=1) + "\n"
    results_file.write_text(data, encoding="utf-8")
    print(text)
    print(json.dumps(results))
    return 0


# Not at import: other binaries have flags of the same names, and tests import several.
if __name__ == "__main__":
    define_flags()
    cli.run(main)
