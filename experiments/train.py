"""Train a model: python -m experiments.train --config=demo --workdir=DIR.

Run the same command again to go on after an interruption. Exit codes: 0 the run is complete,
2 a mistake in the command, or training diverged (one line says which), 75 SIGTERM, Ctrl-C or a
closed terminal: the state was saved, 134 another process of the run died.

Several processes are found in the environment (Slurm, Open MPI, Cloud TPU) or named by
--coordinator, --num_processes and --process_id; docs/guides/clusters.md shows how to start them.
"""

from __future__ import annotations

import json
import pathlib

from absl import flags

import fusedkv_jax as fkv
from experiments.common import cli, models
from fusedkv_jax import processes, training

FLAGS = flags.FLAGS

# Two tokenizers that divide this alike, into the same ids, are one.
_SAMPLE = (
    "The quick brown fox jumps over 13 lazy dogs; größer, 注意:\n\tprint('x' * 2048)  # e.g.\n"
)


def define_flags() -> None:
    """Define the flags."""
    cli.define_config()
    flags.DEFINE_string(
        "workdir", None, "Directory for checkpoints and metrics; a run found there is resumed."
    )
    flags.DEFINE_string(
        "init_from",
        None,
        "Model to start from: a run's directory, a Hugging Face folder, or a .gguf file. It sets "
        "the model's configuration and the tokenizer; --config.model.FIELD may change its layout "
        "and how it is computed.",
    )
    flags.DEFINE_integer(
        "fit_tokens",
        None,
        "With --init_from under another layout: fit the start to the model by least squares on so "
        "many tokens of the training text, instead of leaving out what has no place.",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "teacher",
        None,
        "Model that --config.distillation compares with: a run's directory, a Hugging Face folder, "
        "or a .gguf file; default the one of --init_from, as it was.",
    )
    cli.only_with("fit_tokens", init_from=True)
    flags.DEFINE_string(
        "profile_steps",
        None,
        "FIRST:LAST: write a profiler trace of these steps to WORKDIR/profile.",
    )
    flags.DEFINE_string(
        "wandb_project", None, "Project of Weights & Biases that gets the metrics too."
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, of several processes.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_integer(
        "connect_seconds", processes.CONNECT_SECONDS, "How long to wait for the other processes."
    )


def main() -> int:
    from fusedkv_jax.training.monitoring.metrics import finite_or_none

    config, start = _start()
    workdir, profile_steps = cli.require("workdir"), _steps(FLAGS.profile_steps)
    processes.initialize(
        FLAGS.coordinator,
        FLAGS.num_processes,
        FLAGS.process_id,
        connect_seconds=FLAGS.connect_seconds,
    )
    result = training.train(
        config,
        workdir,
        profile_steps=profile_steps,
        wandb_project=FLAGS.wandb_project,
        initial=None if start is None else lambda: _initial(config, start),
        teacher=_teacher(config, start),
    )
    if processes.is_first():
        summary = {"name": config.name, "step": result.step, "interrupted": result.interrupted}
        print(json.dumps(summary | finite_or_none(result.metrics)))
    return training.INTERRUPTED_EXIT_CODE if result.interrupted else 0


def _start() -> tuple[training.ExperimentConfig, models.Start | None]:
    """The experiment, and the model that it starts from, if not from drawn weights."""
    source = FLAGS.init_from
    if source is None:
        return cli.load_config(), None
    workdir = pathlib.Path(cli.require("workdir")).expanduser()
    if _is_gone(source) and training.committed_steps(training.checkpoint_directory(workdir)):
        source = str(workdir)  # which has the model's configuration too
    start = models.Start(source, workdir / "init_from")
    return start.settle(cli.load_config(start.change)), start


def _is_gone(source: str) -> bool:
    return not pathlib.Path(source).expanduser().exists()


def _initial(config: training.ExperimentConfig, start: models.Start) -> fkv.Decoder:
    """The model before the first step."""
    if not FLAGS.fit_tokens:
        return start.load(config.model)
    import jax

    from fusedkv_jax.sharding import MeshConfig, make_mesh

    tokens = models.training_tokens(config.data, FLAGS.fit_tokens)
    # Each of several processes by itself: least squares are one device's work.
    with jax.set_mesh(make_mesh(MeshConfig(devices=1), jax.local_devices())):
        return start.load(config.model, tokens)


def _teacher(config: training.ExperimentConfig, start: models.Start | None) -> fkv.Decoder | None:
    """What distillation compares the model with."""
    if not config.distillation.is_on:
        if FLAGS.teacher is not None:
            raise ValueError("--teacher goes with --config.distillation.logits or .hidden")
        return None
    if FLAGS.teacher is not None:
        teacher = models.Start(FLAGS.teacher, pathlib.Path(FLAGS.workdir) / "teacher")
        _check_tokens(config, teacher)
        return teacher.original()
    if start is None:
        raise ValueError("--teacher is missing; --config.distillation compares with one")
    if start.path != FLAGS.init_from:
        raise ValueError(
            f"--teacher is missing; --init_from={FLAGS.init_from}, which --config.distillation "
            "compares with, is no longer there"
        )
    return start.original()


def _check_tokens(config: training.ExperimentConfig, teacher: models.Start) -> None:
    """Refuse a teacher to which the ids of the text mean something else."""
    from fusedkv_jax.data import tokenizers
    from fusedkv_jax.training.checkpointing.tokenizer_files import kept_tokenizer

    mine = tokenizers.load(kept_tokenizer(config.data.tokenizer, FLAGS.workdir))
    try:
        other = tokenizers.load(teacher.tokenizer)
    except (ValueError, FileNotFoundError):
        return  # weights alone
    # By what they do: a tokenizer.json that another version has written is another file.
    if mine.encode(_SAMPLE) != other.encode(_SAMPLE):
        raise ValueError(
            f"--teacher={teacher.path} has another tokenizer ({other.name}) than the text "
            f"({mine.name}); choose a teacher with the same one"
        )


def _steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise ValueError(f"--profile_steps={text} must be FIRST:LAST, such as 20:24")
    return int(first), int(last)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
