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
import numpy as np

from experiments import runs
from experiments.longcontext_methods import refusal
from fusedkv_jax import data, training
from fusedkv_jax.data import recall_tasks, tokenizers
from fusedkv_jax.data.recall import RecallSequences
from fusedkv_jax.data.recall_forms import TextForm, TokenForm
from fusedkv_jax.data.sources import RECALL
from fusedkv_jax.evaluation import (
    Case,
    Method,
    Score,
    equal_shapes,
    evaluate_case,
    recall_case,
    text_case,
)
from fusedkv_jax.evaluation.longcontext import Question
from fusedkv_jax.model import Decoder
from fusedkv_jax.training import ExperimentConfig

TEXT = "text"
CONTINUATION = 64  # at most: half of a short text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is evaluated.

    Attributes:
      tasks: names of recall tasks, and "text": held-out text of the run, whose last tokens are
        predicted; empty for all that suit the run.
      length: tokens of an example.
      examples: examples of each task.
      seed: which examples.
      question: "inside" the prompt that is compressed, or "after" it.
    """

    tasks: tuple[str, ...] = ()
    length: int = 512
    examples: int = 32
    seed: int = 0
    question: Question = "inside"

    def __post_init__(self):
        for task in self.tasks:
            if task != TEXT:
                recall_tasks.check(task)


def default_tasks(config: ExperimentConfig) -> tuple[str, ...]:
    """All recall tasks; and text, for a model that was trained on text."""
    return recall_tasks.names() + (() if config.data.source == RECALL else (TEXT,))


def cases(config: ExperimentConfig, settings: Settings) -> list[Case]:
    """The texts of every task, in the form that the model was trained on.

    Raises:
      ValueError: a length that the model or a task cannot have, or too little held-out text.
    """
    limit = config.model.max_length
    if not 1 < settings.length <= limit:
        raise ValueError(f"length={settings.length}; use 2 to the model's max_length={limit}")
    if config.data.source == RECALL:
        form = TokenForm(config.model.vocab_size)
    else:
        form = TextForm(tokenizers.load(config.data.tokenizer))
    found = [
        _text(config, settings)
        if task == TEXT
        else recall_case(
            task,
            form,
            length=settings.length,
            count=settings.examples,
            seed=settings.seed,
            question=settings.question,
        )
        for task in settings.tasks
    ]
    return equal_shapes(found)


def heldout_texts(config: ExperimentConfig, length: int, count: int) -> np.ndarray:
    """Pieces [count, length] of held-out documents: the first of each document, then the second.

    Raises:
      ValueError: there are not as many.
    """
    if config.data.source == RECALL:
        raise ValueError(f"a run on {RECALL!r} has no held-out text; leave task {TEXT} out")
    documents = data.load_corpus(config.data).heldout
    assert not isinstance(documents, RecallSequences)
    pieces = (documents.lengths + 1) // length
    places = [
        (int(document), part * length)
        for part in range(int(pieces.max(initial=0)))
        for document in np.flatnonzero(pieces > part)
    ][:count]
    if len(places) < count:
        raise ValueError(
            f"the held-out text of {config.data.source} has {len(places)} pieces of {length} "
            f"tokens and {count} are wanted; use fewer or shorter examples"
        )
    rows = [documents.read(document, start, start + length) for document, start in places]
    return np.stack(rows).astype(np.int32)


def _text(config: ExperimentConfig, settings: Settings) -> Case:
    texts = heldout_texts(config, settings.length, settings.examples)
    return text_case(texts, continuation=min(CONTINUATION, settings.length // 2))


def run(
    workdirs: Sequence[str], methods: Sequence[Method], settings: Settings, *, strict: bool = True
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
        "environment": runs.environment(),
        "rows": rows,
    }


def evaluate_model(
    name: str,
    model: Decoder,
    config: ExperimentConfig,
    methods: Sequence[Method],
    settings: Settings,
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
