"""Evaluate a trained model: python -m experiments.evaluate --workdir=DIR [--suite=longcontext].

The suite `perplexity` is the loss on held-out text, `length` the same by position and storage type
of the cache, and `longcontext` recall and RULER's tasks from compressed caches. Prints a table, and
as its last line one JSON document with the same figures. Exit code 2 with one line for a mistake in
the command.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from absl import flags

from experiments.common import cli, models
from experiments.common.documents import Document
from fusedkv_jax import compression, data, training
from fusedkv_jax.cache import STORAGE_TYPES
from fusedkv_jax.training.monitoring.progress import Progress

FLAGS = flags.FLAGS

SUITES = ("perplexity", "length", "longcontext")


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_enum("suite", "perplexity", SUITES, "What to evaluate.")
    models.define_flags(
        "Directory of a training run; for the suite longcontext also several, with commas between."
    )
    flags.DEFINE_string(
        "source",
        None,
        "File, folder or glob to evaluate on: all of it, or of shards their held-out split. "
        "Default: the held-out split of the run's data.",
    )
    flags.DEFINE_integer(
        "max_batches", None, "Evaluate on the first so many batches only.", lower_bound=1
    )
    flags.DEFINE_integer(
        "length", None, "Tokens of an example; default that of training.", lower_bound=2
    )
    flags.DEFINE_integer("examples", 32, "Examples of each task.", lower_bound=1)
    flags.DEFINE_multi_string(
        "cache_dtype", [], f"Storage type of the cache, repeatable: {', '.join(STORAGE_TYPES)}."
    )
    flags.DEFINE_multi_string(
        "compression",
        [],
        "A compressor with its fields, as in snapkv:budget=64, or none for the whole cache alone; "
        "repeatable; default all that there are at several budgets: "
        f"{', '.join(compression.names())}.",
    )
    flags.DEFINE_list(
        "tasks",
        [],
        "Tasks of the suite longcontext, `ruler` for RULER's thirteen; default the recall tasks, "
        "and held-out text where there is some.",
    )
    flags.DEFINE_string(
        "essays", None, "File or folder of text in which RULER's needles are hidden."
    )
    flags.DEFINE_string("squad", None, "SQuAD 2.0's JSON file, for RULER's task qa_1.")
    flags.DEFINE_string("hotpotqa", None, "HotpotQA's JSON file (distractors), for RULER's qa_2.")
    flags.DEFINE_enum(
        "question",
        "inside",
        ["inside", "after"],
        "Whether the prompt that is compressed ends with the first question, or before it.",
    )
    flags.DEFINE_integer("seed", 0, "Which examples.", lower_bound=0)
    flags.DEFINE_string("output", None, "Folder for longcontext.md, longcontext.json and the plot.")
    cli.only_with("max_batches", suite="perplexity")
    cli.only_with("source", suite=("perplexity", "length"))
    cli.only_with("step", suite=("perplexity", "length"))
    cli.only_with("length examples cache_dtype", suite=("length", "longcontext"))
    cli.only_with("compression tasks question seed output", suite="longcontext")
    cli.only_with("essays squad hotpotqa", suite="longcontext")


def main() -> None:
    suites = {"perplexity": perplexity, "length": length, "longcontext": long_context}
    report = suites[FLAGS.suite]()
    print(json.dumps(report))


def perplexity() -> Document:
    """Loss on held-out text."""
    from flax import nnx

    loaded = models.load(source=FLAGS.source)
    config = models.with_text(loaded).config
    batches = data.make_eval_batches(config.data, FLAGS.max_batches)
    graphdef, params = nnx.split(loaded.model, nnx.Param)
    eval_step = training.make_eval_step(graphdef, config.train.grad_accumulation)
    with Progress(len(batches), label="evaluating", unit="batch") as progress:
        result = training.evaluate(eval_step, params, _counted(batches, progress))
    report = {
        "name": config.name,
        "workdir": loaded.where,
        "step": loaded.step,
        "source": FLAGS.source or "held-out split",
        "tokens": result.num_tokens,
        "bytes": result.num_bytes,
        **result.metrics,
    }
    print_table(report)
    return report


def length() -> Document:
    """Loss by position and storage type, of held-out texts that are long enough."""
    from fusedkv_jax.evaluation import at_length, total
    from fusedkv_jax.evaluation.longcontext_cases import heldout_texts

    loaded = models.load(source=FLAGS.source)
    model, config, step = loaded.model, models.with_text(loaded).config, loaded.step
    size = FLAGS.length or config.data.seq_len
    texts = heldout_texts(config, size, FLAGS.examples)
    rows = []
    for dtype in FLAGS.cache_dtype or [model.config.dtype]:
        parts = at_length(model, texts, chunk=max(1, size // 8), cache_dtype=dtype)
        rows.append(
            {
                "cache_dtype": dtype,
                "perplexity": total(parts).perplexity,
                "by_position": {f"{p.start}-{p.stop}": p.perplexity for p in parts},
            }
        )
        print_table({"cache": dtype, "all": rows[-1]["perplexity"], **rows[-1]["by_position"]})
    return {"name": config.name, "step": step, "length": size, "rows": rows}


def long_context() -> Document:
    """Recall from compressed caches, for one or several runs, or another's model."""
    from experiments.suites import longcontext, longcontext_methods, longcontext_report
    from fusedkv_jax.evaluation.longcontext_cases import LongContextSettings

    sources = longcontext.sources()
    output = FLAGS.output and cli.check_output(FLAGS.output, folder=True)
    chosen = bool(FLAGS.compression or FLAGS.cache_dtype)
    size = FLAGS.length or sources[0].config.data.seq_len
    methods = (
        longcontext_methods.methods(FLAGS.compression, FLAGS.cache_dtype)
        if chosen
        else longcontext_methods.defaults(size)
    )
    settings = LongContextSettings(
        tasks=tuple(FLAGS.tasks),
        length=size,
        examples=FLAGS.examples,
        seed=FLAGS.seed,
        question=FLAGS.question,
        essays=FLAGS.essays,
        squad=FLAGS.squad,
        hotpotqa=FLAGS.hotpotqa,
    )
    results = longcontext.run(sources, methods, settings, strict=chosen)
    print(longcontext_report.markdown(results))
    if output:
        longcontext_report.write(results, output)
    return results


def print_table(report: Document) -> None:
    """Print names and values in two columns."""
    width = max(map(len, report))
    for name, value in report.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        print(f"{name:<{width}}  {shown}")


def _counted(
    batches: Iterable[Mapping[str, Any]], progress: Progress
) -> Iterator[Mapping[str, Any]]:
    for batch in batches:
        yield batch
        progress.advance()


# Not at import: other binaries have flags of the same names, and tests import several.
if __name__ == "__main__":
    define_flags()
    cli.run(main)
