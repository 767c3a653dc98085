"""The suite `longcontext` of experiments.evaluate: what a compressed cache costs in quality.

Each method reads the same texts, and is compared with the whole cache at the places where answers
are: accuracy, KL, top-1 agreement, and the bytes of the arrays that hold its cache.
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence

import jax

from experiments.common import models
from experiments.common.documents import Document
from experiments.suites.longcontext_methods import refusal
from fusedkv_jax import processes
from fusedkv_jax.evaluation import Method, Score, evaluate_case
from fusedkv_jax.evaluation.longcontext_cases import (
    TEXT,
    LongContextSettings,
    cases,
    default_tasks,
)
from fusedkv_jax.model import Decoder
from fusedkv_jax.training import ExperimentConfig


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that has not been loaded.

    Attributes:
      where: the work directory, folder or file.
      config: of its run; of another's model, the model's own with default data settings.
      load: reads it.
      is_run: whether it is a training run, which has held-out text.
    """

    where: str
    config: ExperimentConfig
    load: Callable[[], models.Loaded]
    is_run: bool


def sources() -> list[Source]:
    """The runs of --workdir, or the model of --model.

    Raises:
      ValueError: neither or both are given, or what reading their configurations raises.
    """
    workdir, model = models.named()
    if model:
        loaded = models.load()
        return [Source(model, loaded.config, lambda: loaded, is_run=False)]
    names = [name for name in workdir.split(",") if name]
    if not names:
        raise ValueError(f"--workdir={workdir} names no run")
    return [
        Source(name, models.run_config(name), lambda name=name: models.load_run(name), is_run=True)
        for name in names
    ]


def run(
    places: Sequence[Source],
    methods: Sequence[Method],
    settings: LongContextSettings,
    *,
    strict: bool = True,
) -> Document:
    """Evaluate the newest checkpoints of runs, or another's model; returns the results.

    Args:
      places: training runs, each of another layout or recipe, or a model.
      methods: what to compare, the whole cache among them.
      settings: what is evaluated.
      strict: refuse a method that no model can use; otherwise it is only named in the results.

    Raises:
      ValueError: such a method, held-out text of a model that has none, and what `cases` and
        loading raise.
    """
    for place in places:
        if TEXT in settings.tasks and not place.is_run:
            raise ValueError(f"{place.where} has no held-out text; leave task {TEXT} out")
    if strict:  # before anything runs
        for method in methods:
            reasons = [refusal(method, place.config.model) for place in places]
            if all(reasons):
                raise ValueError(f"compression={method.name} serves no model: {reasons[0]}")
    rows, described = [], {}
    for place in places:
        loaded = place.load()
        model, config = loaded.model, loaded.config
        tasks = settings.tasks or default_tasks(config, heldout=place.is_run)
        name = (place.is_run and config.model.kv_layout.spec) or config.name
        name = name if name not in described else f"{name} ({place.where})"
        described[name] = {"experiment": config.name, "step": loaded.step, "tasks": tasks}
        own = dataclasses.replace(settings, tasks=tasks)
        rows += evaluate_model(name, model, config, methods, own)
        jax.clear_caches()  # the programs of one model are of no use to the next
    return {
        "suite": "longcontext",
        "models": described,
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
) -> list[Document]:
    """One row for each method; those that the model cannot use say why."""
    reasons = {method.name: refusal(method, model.config) for method in methods}
    usable = [method for method in methods if not reasons[method.name]]
    scores: dict[str, list[Score]] = {method.name: [] for method in methods}
    for case in cases(config, settings):
        print(f"{name}: {case.name} ...", file=sys.stderr, flush=True)
        for method, score in evaluate_case(model, case, usable).items():
            scores[method].append(score)
    return [_row(name, method, scores[method.name], reasons[method.name]) for method in methods]


def _row(layout: str, method: Method, scores: Sequence[Score], refused: str) -> Document:
    row: Document = {"layout": layout, "method": method.name, "refused": refused}
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
