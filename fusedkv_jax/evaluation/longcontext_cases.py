"""The long-context cases of a run: recall in the form that it was trained on, and held-out text."""

import dataclasses

import numpy as np

from fusedkv_jax import data
from fusedkv_jax.data import recall_tasks, tokenizers
from fusedkv_jax.data.recall import RecallSequences
from fusedkv_jax.data.recall_forms import TextForm, TokenForm
from fusedkv_jax.data.sources import RECALL
from fusedkv_jax.evaluation.longcontext import (
    Case,
    Question,
    equal_shapes,
    recall_case,
    text_case,
)
from fusedkv_jax.training import ExperimentConfig

TEXT = "text"
CONTINUATION = 64  # at most: half of a short text


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongContextSettings:
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


def cases(config: ExperimentConfig, settings: LongContextSettings) -> list[Case]:
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


def _text(config: ExperimentConfig, settings: LongContextSettings) -> Case:
    texts = heldout_texts(config, settings.length, settings.examples)
    return text_case(texts, continuation=min(CONTINUATION, settings.length // 2))
