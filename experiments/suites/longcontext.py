"""The suite `longcontext` of experiments.evaluate: what a compressed cache costs in quality.

Each method reads the same texts, and is compared with the whole cache at the places where answers
are: accuracy, KL, top-1 agreement, and the bytes of the arrays that hold its cache.
"""

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax

from experiments.suites.longcontext_methods import refusal
from fusedkv_jax import processes, training
from fusedkv_jax.evaluation import Method, Score, evaluate_case
from fusedkv_jax.evaluation.longcontext_cases import LongContextSettings, cases, default_tasks
from fusedkv_jax.model import Decoder
from fusedkv_jax.training import ExperimentConfig


def run(
    workdirs: Sequence[str],
    methods: Sequence[Method],
    settings: LongContextSettings,
    *,
    strict: bool = True,
) -> dict[str, Any]:
    """Evaluate the newest checkpoints of runs; returns the results.

    Args:
      workdirs: of training runs, each of another layout or recipe.
      methods: what to compare, the whole cache among them.
      settings: what is evaluated.
      strict: refuse a method that no model can use; otherwise it is only named in the results.

    Raises:
      ValueError: such a method, and what `cases` and `load_model` raise.
    """
    if strict:  # before anything runs
        configs = [training.load_model(workdir)[1].model for workdir in workdirs]
        for method in methods:
            reasons = [refusal(method, config) for config in configs]
            if all(reasons):
                raise ValueError(f"compression={method.name} serves no model: {reasons[0]}")
    rows, models = [], {}
    for workdir in workdirs:
        model, config, step = training.load_model(workdir)
        tasks = settings.tasks or default_tasks(config)
        name = config.model.kv_layout.spec or config.name
        name = name if name not in models else f"{name} ({workdir})"
        models[name] = {"experiment": config.name, "step": step, "tasks": tasks}
        own = dataclasses.replace(settings, tasks=tasks)
        rows += evaluate_model(name, model, config, methods, own)
        jax.clear_caches()  # the programs of one model are of no use to the next
    return {
        "suite": "longcontext",
        "models": models,
        "settings": dataclasses.asdict(settings),
        "environment": processes.environment(),
        "rows": rows,
    }


def evaluate_model(
    name: str,
    model: Decoder,
    config: ExperimentConfig,
    methods: Sequence[Method],
    settings: LongContextSettings,
) -> list[dict[str, Any]]:
    """One row for each method; those that the model cannot use say why."""
    reasons = {method.name: refusal(method, model.config) for method in methods}
    usable = [method for method in methods if not reasons[method.name]]
    scores: dict[str, list[Score]] = {method.name: [] for method in methods}
    for case in cases(config, settings):
        print(f"{name}: {case.name} ...", file=sys.stderr, flush=True)
        for method, score in evaluate_case(model, case, usable).items():
            scores[method].append(score)
    return [_row(name, method, scores[method.name], reasons[method.name]) for method in methods]


def _row(layout: str, method: Method, scores: Sequence[Score], refused: str) -> dict[str, Any]:
    row: dict[str, Any] = {"layout": layout, "method": method.name, "refused": refused}
    if refused:
        return row
    accuracies = [score.accuracy for score in scores if score.accuracy is not None]
    return row | {
        "family": _family(method),
        "accuracy": statistics.fmean(accuracies) if accuracies else None,
        "kl": statistics.fmean(score.kl for score in scores),
        "top1": statistics.fmean(score.top1 for score in scores),
        "cache_bytes": statistics.fmean(score.cache_bytes for score in scores),
        "bytes_ratio": statistics.fmean(score.bytes_ratio for score in scores),
        "tasks": {score.task: dataclasses.asdict(score) for score in scores},
    }


def _family(method: Method) -> str:
    """What points of one line in the picture have in common."""
    if method.compression is None:
        return "storage type" if method.cache_dtype else method.name
    title = method.compression.title
    return f"{title} {method.cache_dtype}" if method.cache_dtype else title
