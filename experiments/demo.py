"""The demonstration: python -m experiments.demo --workdir=runs/demo (`make demo`).

Trains a FusedKV model and the standard transformer on the same tokens, lets both write Python,
and compares loss, cache and speed. Leaves loss_curves.png, fusion_weights.png and results.json
in --workdir. The last line on standard output is results.json as one line. Run the same command
again to go on after an interruption, or to see the results of a finished run.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys
from typing import Any

from absl import flags

import fusedkv_jax as fkv
from experiments.common import cli, completions, pictures, runs
from experiments.common.documents import Document
from fusedkv_jax import costs, processes, training
from fusedkv_jax.data import tokenizers
from fusedkv_jax.data.encoding import encode_prompt
from fusedkv_jax.layouts import KVLayout
from fusedkv_jax.training import ExperimentConfig

FLAGS = flags.FLAGS

BASELINE = "mha"
PROMPT = "import os\n\n\nclass Reader:\n    def __init__(self, path):\n"
SAMPLING = fkv.SamplingParams(
    temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=0, max_tokens=240
)
LOSS_CURVES_FILE, FUSION_WEIGHTS_FILE = "loss_curves.png", "fusion_weights.png"
RESULTS_FILE = "results.json"

_MOST = 1_000_000  # of any figure of `Timing`
# Rows of the table: heading, key in the results, unit it is divided by, decimals.
_ROWS = (
    ("validation loss (bits per byte)", "bits_per_byte", 1, 4),
    ("parameters", "parameters", 1, 0),
    ("cache (bytes per token)", "cache_bytes_per_token", 1, 0),
    ("time to first token (ms)", "first_token_seconds", 1e-3, 1),
    ("time per output token (ms)", "output_token_seconds", 1e-3, 2),
    ("training time (s)", "train_seconds", 1, 0),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """How speed is measured: prompt and output in tokens, and rounds of which the median counts."""

    prompt_length: int = 1024
    new_tokens: int = 64
    repeats: int = 7

    def __post_init__(self) -> None:
        for name, least in (("prompt_length", 1), ("new_tokens", 2), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; use {least} or more")
            if getattr(self, name) > _MOST:  # known now, not after the training
                raise ValueError(f"{name}={getattr(self, name)}; use {_MOST:,} or less")


def compare(config: ExperimentConfig, workdir: pathlib.Path, timing: Timing = Timing()) -> Document:
    """Train the layout of `config` and the baseline with equal budgets; returns the results.

    Args:
      config: the experiment; the baseline is the same with layout "mha".
      workdir: holds one directory for each of the two, the pictures and results.json.
      timing: how speed is measured.

    Raises:
      ValueError: the layout is the baseline itself, and what `runs.complete` raises.
      runs.Interrupted: a signal ended the training.
    """
    name = config.model.kv_layout.spec or "custom"
    if name == BASELINE:
        raise ValueError(f"model.layout={BASELINE} is what the demo compares with; name another")
    finished = {
        key: runs.complete(_with_layout(config, key, layout), workdir / _file_name(key))
        for key, layout in ((BASELINE, BASELINE), (name, config.model.layout))
    }
    import numpy as np

    from experiments.benchmarks import latency

    models = {key: training.load_model(run.workdir)[0] for key, run in finished.items()}
    tokenizer = tokenizers.load(config.data.tokenizer)
    prompt = np.resize(encode_prompt(tokenizer, PROMPT), timing.prompt_length).astype(np.int32)
    speeds = latency.measure(models, prompt, new_tokens=timing.new_tokens, repeats=timing.repeats)
    figures = {
        key: {
            "bits_per_byte": run.bits_per_byte,
            "parameters": costs.parameter_count(run.config.model),
            "cache_bytes_per_token": costs.cache_bytes_per_token(
                run.config.model, run.config.model.dtype
            ),
            "first_token_seconds": speeds[key].first_token,
            "output_token_seconds": speeds[key].output_token,
            "train_seconds": run.seconds,
            "sample": completions.continue_texts(models[key], tokenizer, [PROMPT], SAMPLING)[
                0
            ].text,
        }
        for key, run in finished.items()
    }
    results = {
        "experiment": config.name,
        "steps": config.train.steps,
        "train_tokens": config.train.steps * config.data.batch_size * config.data.seq_len,
        "timing": dataclasses.asdict(timing),
        "environment": processes.environment(),
        "layouts": figures,
        "ratios": {row[1]: figures[name][row[1]] / figures[BASELINE][row[1]] for row in _ROWS},
    }
    histories = {key: run.history for key, run in finished.items()}
    pictures.draw_loss_curves(histories, workdir / LOSS_CURVES_FILE)
    pictures.draw_fusion_weights(models[name], workdir / FUSION_WEIGHTS_FILE)
    (workdir / RESULTS_FILE).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def table(results: Document) -> str:
    """The comparison in plain text: a column for each layout, and their ratio."""
    layouts = list(results["layouts"])
    lines = [["", *layouts, "ratio"]]
    for heading, key, unit, decimals in _ROWS:
        values = [results["layouts"][layout][key] / unit for layout in layouts]
        cells = [f"{value:,.{decimals}f}" for value in values]
        lines.append([heading, *cells, f"{results['ratios'][key]:.3f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _with_layout(config: ExperimentConfig, name: str, layout: str | KVLayout) -> ExperimentConfig:
    model = config.model.replace(layout=layout)
    return dataclasses.replace(config, name=f"{config.name} {name}", model=model)


def _file_name(layout: str) -> str:
    """A directory name for a layout such as cla:k=3."""
    return re.sub(r"[^\w.=-]+", "_", layout)


def define_flags() -> None:
    """Define the flags."""
    timing = Timing()
    cli.define_config("demo")
    flags.DEFINE_string("workdir", None, "Directory for the runs, the pictures and the results.")
    flags.DEFINE_integer(
        "prompt_length", timing.prompt_length, "Tokens of the prompt whose speed is measured."
    )
    flags.DEFINE_integer("new_tokens", timing.new_tokens, "Tokens decoded when measuring speed.")
    flags.DEFINE_integer("repeats", timing.repeats, "Rounds of measuring; the median counts.")


def main() -> int:
    names = [field.name for field in dataclasses.fields(Timing)]
    values: dict[str, Any] = {name: FLAGS[name].value for name in names}
    timing = Timing(**values)
    workdir, config = pathlib.Path(cli.require("workdir")), cli.load_config()
    cli.check_results_file(workdir / RESULTS_FILE)
    for name in (LOSS_CURVES_FILE, FUSION_WEIGHTS_FILE):
        cli.check_output(workdir / name)
    try:
        results = compare(config, workdir, timing)
    except runs.Interrupted as stop:
        print(stop, file=sys.stderr)
        return training.INTERRUPTED_EXIT_CODE
    for layout, figures in results["layouts"].items():
        print(f"\n--- what {layout} writes after a prompt of five lines ---")
        print(PROMPT + figures["sample"])
    environment = results["environment"]
    print(
        f"\n{results['experiment']}: {results['train_tokens']:,} tokens of training each, "
        f"{environment['devices']} x {environment['device']} ({environment['processor']}), "
        f"speed with a prompt of {timing.prompt_length} tokens"
    )
    print(table(results))
    print(f"\npictures and {RESULTS_FILE} are in {workdir}")
    print(json.dumps(results))
    return 0


# Not at import: other binaries have flags of the same names, and tests import several.
if __name__ == "__main__":
    define_flags()
    cli.run(main)
