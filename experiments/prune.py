"""Drop the fusion sources that matter least: python -m experiments.prune --workdir=DIR.

Prunes a trained model step by step on some of its held-out text, or the model of a folder (--model)
on the text of --source. Prints for every step the cache bytes that a token reads and how far the
predictions have moved; then, for each budget, the loss on the held-out text and the time per output
token, models in turns. Each pruned model is saved in a work directory of its own, for evaluate,
generate and further training. The last line is one JSON document.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

from absl import flags

import fusedkv_jax as fkv
from experiments.common import cli, models
from experiments.common.documents import Document
from fusedkv_jax import compression, data, training
from fusedkv_jax.training import ExperimentConfig

FLAGS = flags.FLAGS

NEW_TOKENS = 33


def define_flags() -> None:
    """Define the flags."""
    models.define_flags("Directory of a training run whose layout fuses streams.")
    flags.DEFINE_string(
        "source",
        None,
        "Text to calibrate and evaluate on: all of it, or of shards their held-out split; "
        "--model needs it.",
    )
    flags.DEFINE_multi_float(
        "budget", [1.25, 1.0], "Cache reads to reach, of one stream a layer; may be repeated."
    )
    flags.DEFINE_integer("texts", 8, "Held-out texts to calibrate on.", lower_bound=1)
    flags.DEFINE_integer("group", 1, "Consecutive layers that are pruned alike.", lower_bound=1)
    flags.DEFINE_bool("refit", True, "Fit the weights that remain by least squares.")
    flags.DEFINE_integer("max_batches", 16, "Batches of held-out text for the loss.", lower_bound=1)
    flags.DEFINE_integer("length", 1024, "Prompt tokens where the time is measured.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Turns of each model.", lower_bound=1)
    flags.DEFINE_string(
        "output",
        None,
        "Folder for the pruned models, a work directory for each budget; default WORKDIR/pruned.",
    )
    cli.only_with("source", model=True)


def main() -> None:
    if not models.named()[0]:  # what is made of a model of others has no place of its own
        cli.require("output")
    loaded = models.with_text(models.load(source=FLAGS.source))
    model, config = loaded.model, loaded.config
    output = cli.check_output(FLAGS.output or f"{loaded.where}/pruned", folder=True)
    if len(set(FLAGS.budget)) < len(FLAGS.budget):
        raise ValueError("--budget is given twice with one value; give it once")
    folders = {budget: output / f"budget_{budget:g}" for budget in sorted(FLAGS.budget)}
    for folder in folders.values():
        if folder.exists():
            raise ValueError(f"{folder} exists already; remove it, or name another --output")
    import jax.numpy as jnp

    from fusedkv_jax.evaluation.longcontext_cases import heldout_texts

    texts = jnp.asarray(heldout_texts(config, config.data.seq_len, FLAGS.texts))
    options = {"group": FLAGS.group, "refit": FLAGS.refit}
    compared: dict[str, fkv.Decoder] = {"whole": fkv.fold_fusion(model)}
    reads: dict[str, float] = {}
    report: compression.PruningReport | None = None
    for budget, folder in folders.items():  # the smallest first: its report has all steps
        pruned, found = compression.prune_sources(model, budget, texts, progress=_say, **options)
        save(pruned, loaded, folder)
        report = report or found
        name = f"budget {budget:g}"
        compared[name], reads[name] = pruned, found.steps[-1].reads
    assert report is not None
    reads["whole"] = report.steps[0].reads
    print(report)
    rows = _rows(compared, reads, config)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    steps = [dataclasses.asdict(s) for s in report.steps]
    document = {"name": config.name, "step": loaded.step, "steps": steps, "models": rows}
    document["workdirs"] = [str(folder) for folder in folders.values()]
    print(json.dumps(document))


def save(model: fkv.Decoder, loaded: models.Loaded, workdir: pathlib.Path) -> None:
    """Leave a model as the checkpoint of a run that begins with it, at step 0.

    What was no run before is saved without an optimizer and a place in the data.
    """
    from flax import nnx

    config = dataclasses.replace(loaded.config, model=model.config)
    if loaded.step is None:
        training.save_model(model, config, workdir)
        return
    from fusedkv_jax.training.trainable import run_optimizer

    optimizer = run_optimizer(config)
    state = training.create_state(config.model, optimizer, config.train.seed)
    params = nnx.state(model, nnx.Param)
    state = dataclasses.replace(state, params=params)
    with training.Checkpoints(workdir, keep=1) as checkpoints:
        checkpoints.save(0, state, data.make_train_iterator(config.data), config)
    if training.committed_steps(training.checkpoint_directory(workdir)) != [0]:
        raise OSError(f"{workdir}: the pruned model could not be saved")


def _say(step: compression.PruningStep) -> None:
    print(
        f"reads {step.reads:.3f}x, KL {step.divergence:.6f} nats per token",
        file=sys.stderr,
        flush=True,
    )


def _rows(
    compared: dict[str, fkv.Decoder], reads: dict[str, float], config: ExperimentConfig
) -> list[Document]:
    """Reads, loss and time of every model."""
    import numpy as np
    from flax import nnx

    from experiments.benchmarks import latency

    prompt = np.arange(FLAGS.length, dtype=np.int32) % config.model.vocab_size
    times = latency.measure(compared, prompt, new_tokens=NEW_TOKENS, repeats=FLAGS.rounds)
    rows = []
    for name, model in compared.items():
        graphdef, params = nnx.split(model, nnx.Param)
        batches = data.make_eval_batches(config.data, FLAGS.max_batches)
        result = training.evaluate(training.make_eval_step(graphdef), params, batches)
        rows.append(
            {
                "model": name,
                "reads": round(reads[name], 3),
                "loss": round(result.metrics["loss"], 4),
                "ms_per_token": round(1e3 * times[name].output_token, 3),
            }
        )
    return rows


if __name__ == "__main__":
    define_flags()
    cli.run(main)
