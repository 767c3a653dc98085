"""Loss of a trained model on held-out text: python -m experiments.evaluate --workdir=DIR.

Prints a table, and as its last line one JSON document with the same figures. Exit code 2 with
one line for a mistake in the command.
"""

import dataclasses
import json

from absl import flags
from flax import nnx

from experiments import cli
from fusedkv_jax import data
from fusedkv_jax.training import evaluate, load_model, make_eval_step
from fusedkv_jax.training.progress import Progress

flags.DEFINE_string("workdir", None, "Directory of a training run.")
flags.DEFINE_integer("step", None, "Checkpoint to evaluate; default the newest.", lower_bound=1)
flags.DEFINE_string(
    "source",
    None,
    "File, folder or glob to evaluate on, all of it; default the held-out split of the run's data.",
)
flags.DEFINE_integer(
    "max_batches", None, "Evaluate on the first so many batches only.", lower_bound=1
)


def main() -> None:
    workdir = cli.require("workdir")
    model, config, step = load_model(workdir, flags.FLAGS.step)
    source, settings = "held-out split", config.data
    if flags.FLAGS.source:
        source = flags.FLAGS.source
        settings = dataclasses.replace(settings, source=source, holdout_fraction=1.0)
    batches = data.make_eval_batches(settings, flags.FLAGS.max_batches)
    graphdef, params = nnx.split(model, nnx.Param)
    eval_step = make_eval_step(graphdef, config.train.grad_accumulation)
    with Progress(len(batches), label="evaluating", unit="batch") as progress:
        result = evaluate(eval_step, params, _counted(batches, progress))
    report = {
        "name": config.name,
        "workdir": workdir,
        "step": step,
        "source": source,
        "tokens": result.num_tokens,
        "bytes": result.num_bytes,
        **result.metrics,
    }
    print_table(report)
    print(json.dumps(report))


def print_table(report: dict[str, object]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, report))
    for name, value in report.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        print(f"{name:<{width}}  {shown}")


def _counted(batches, progress: Progress):
    for batch in batches:
        yield batch
        progress.advance()


if __name__ == "__main__":
    cli.run(main)
