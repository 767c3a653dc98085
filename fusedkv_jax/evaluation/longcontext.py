"""The long-context suite: recall accuracy, agreement and cache bytes of compressed caches."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from fusedkv_jax.data import recall_tasks
from fusedkv_jax.data.recall_forms import Form
from fusedkv_jax.evaluation.agreement import agreement, exact_matches, losses
from fusedkv_jax.evaluation.replay import Replay, Split, align, replay, split, widen
from fusedkv_jax.model import Decoder

Question = Literal["inside", "after"]


@dataclasses.dataclass(frozen=True)
class Method:
    """One way of keeping the cache.

    Attributes:
      name: for tables.
      compression: a compressor of `fusedkv_jax.compression`, or None.
      cache_dtype: storage type, or None for the model's activation type.
    """

    name: str
    compression: Any = None
    cache_dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class Score:
    """What a method reached on one task.

    Attributes:
      task: the task.
      accuracy: share of the answers that are right in every token; None for plain text.
      kl, top1: agreement with the whole cache at the places that are predicted.
      loss: of those places, nats per token.
      cache_bytes: of the compressed cache, for the whole batch.
      bytes_ratio: the same over the whole cache in the model's activation type.
    """

    task: str
    accuracy: float | None
    kl: float
    top1: float
    loss: float
    cache_bytes: int
    bytes_ratio: float


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of texts cut into prompt and what follows.

    Attributes:
      name: of the task.
      parts: the texts.
      answers: [B, C] as in `recall_tasks.Examples`; any positive number where a place counts.
      has_answers: whether the places are answers, or plain text.
    """

    name: str
    parts: Split
    answers: np.ndarray
    has_answers: bool


def recall_case(
    task: str, form: Form, *, length: int, count: int, seed: int = 0, question: Question = "inside"
) -> Case:
    """A batch of a recall task.

    Args:
      task: one of `recall_tasks.names()`.
      form: how facts are written.
      length: tokens of an example.
      count: number of examples.
      seed: which examples.
      question: "inside": the prompt ends with the first question, so that a compressor that
        looks at the end of the prompt knows what will be asked; "after": it ends with the facts.

    Raises:
      ValueError: an unknown task, or one that does not fit into the length.
    """
    examples = recall_tasks.make(task, form, length=length, count=count, seed=seed)
    cut = examples.context
    if question == "inside":
        cut = (examples.answers > 0).argmax(axis=1)
    parts = split(examples.tokens, cut)
    return Case(task, parts, align(examples.answers, parts), True)


def text_case(texts: np.ndarray, *, continuation: int) -> Case:
    """Plain texts [B, L] whose last `continuation` tokens are predicted."""
    cut = np.full(len(texts), texts.shape[1] - continuation)
    parts = split(texts, cut)
    return Case("text", parts, np.ones(parts.tokens.shape, np.int32), False)


def equal_shapes(cases: Sequence[Case]) -> list[Case]:
    """The same cases padded to the shapes of the longest, so that each method compiles once."""
    prompts = max(case.parts.prompts.shape[1] for case in cases)
    width = max(case.parts.tokens.shape[1] for case in cases)
    return [
        dataclasses.replace(
            case,
            parts=widen(case.parts, prompts, width),
            answers=np.pad(case.answers, ((0, 0), (0, width - case.answers.shape[1]))),
        )
        for case in cases
    ]


def evaluate_case(
    model: Decoder,
    case: Case,
    methods: Sequence[Method],
    report: Callable[[Method, Score], Any] = lambda method, score: None,
) -> dict[str, Score]:
    """Score methods on a batch, next to the whole cache.

    Args:
      model: the model.
      case: the batch.
      methods: with different names.
      report: called with each result when it is there.

    Returns:
      The scores by name of the method.

    Raises:
      ValueError: as `replay`.
    """
    whole = replay(model, case.parts)
    scores = {}
    for method in methods:
        if method.compression is None and method.cache_dtype is None:
            found = whole
        else:
            found = replay(
                model,
                case.parts,
                compression=method.compression,
                cache_dtype=method.cache_dtype,
            )
        scores[method.name] = _score(case, whole, found)
        report(method, scores[method.name])
    return scores


def _score(case: Case, whole: Replay, found: Replay) -> Score:
    tokens, answers = case.parts.tokens, case.answers
    near = agreement(whole.logits, found.logits, answers)
    right, asked = exact_matches(found.logits, tokens, answers) if case.has_answers else (0, 0)
    loss, places = losses(found.logits, tokens, answers)
    return Score(
        task=case.name,
        accuracy=right / asked if asked else None,
        kl=near.kl,
        top1=near.top1,
        loss=loss / places,
        cache_bytes=found.cache_bytes,
        bytes_ratio=found.cache_bytes / whole.cache_bytes,
    )
