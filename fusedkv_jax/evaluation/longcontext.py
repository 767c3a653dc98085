"""The long-context suite: recall accuracy, agreement and cache bytes of compressed caches."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from fusedkv_jax.compression import Compressor
from fusedkv_jax.data import recall_tasks
from fusedkv_jax.data.encoding import encode_prompt, output_decoder
from fusedkv_jax.data.recall_forms import Form
from fusedkv_jax.data.tokenizers import Tokenizer
from fusedkv_jax.evaluation import ruler
from fusedkv_jax.evaluation.agreement import agreement, exact_matches, losses
from fusedkv_jax.evaluation.replay import Replay, Split, align, replay, split, widen
from fusedkv_jax.model import Decoder
from fusedkv_jax.validation import check_type

Question = Literal["inside", "after"]
_TOKENS_AT_ONCE = 1 << 16  # of rows that are run together


@dataclasses.dataclass(frozen=True)
class Method:
    """One way of keeping the cache.

    Attributes:
      name: for tables.
      compression: a compressor of `fusedkv_jax.compression`, or None.
      cache_dtype: storage type, or None for the model's activation type.
    """

    name: str
    compression: Compressor | None = None
    cache_dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class Score:
    """What a method reached on one task.

    Attributes:
      task: the task.
      accuracy: share of the answers that are right in every token, or the mean score of what the
        model writes; None for plain text.
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
class Writing:
    """How the text that a model writes after the prompts of a case is scored.

    Attributes:
      tokens: to write.
      score: of a row's number and the tokens [tokens] written there, 0 to 1.
    """

    tokens: int
    score: Callable[[int, np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of texts cut into prompt and what follows.

    Attributes:
      name: of the task.
      parts: the texts.
      answers: [B, C] as in `recall_tasks.Examples`; any positive number where a place counts.
      has_answers: whether the places are answers, or plain text.
      writing: what the model writes by itself is scored, instead of those places.
    """

    name: str
    parts: Split
    answers: np.ndarray
    has_answers: bool
    writing: Writing | None = None

    def rows(self, start: int, stop: int) -> "Case":
        """Some of the texts."""
        parts = (getattr(self.parts, each.name)[start:stop] for each in dataclasses.fields(Split))
        return dataclasses.replace(
            self, parts=Split(*parts), answers=self.answers[start:stop], writing=self._later(start)
        )

    def _later(self, start: int) -> Writing | None:
        if self.writing is None:
            return None
        score = self.writing.score
        return Writing(self.writing.tokens, lambda row, tokens: score(start + row, tokens))


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
      ValueError: an unknown question, or as `recall_tasks.make`.
    """
    check_type("question", question, Question, ValueError)
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


def ruler_case(
    task: str,
    tokenizer: Tokenizer,
    *,
    length: int,
    count: int,
    seed: int = 0,
    material: ruler.Material | None = None,
) -> Case:
    """A batch of one of RULER's tasks, scored by the text that the model writes.

    What follows each prompt is the right reply, where methods are compared with the whole cache.

    Args:
      task: one of `ruler.TASKS`.
      tokenizer: of the model.
      length: tokens of a prompt and of what is written after it.
      count: number of examples.
      seed: which examples.
      material: what the task needs, see `ruler.load_material`.

    Raises:
      ValueError: as `ruler.make`.
    """
    samples = ruler.make(task, tokenizer, length=length, count=count, seed=seed, material=material)
    found, decode = ruler.TASKS[task], output_decoder(tokenizer)
    # Every example of this length has room for as many, so that all tasks have few shapes.
    prompts = np.zeros((count, length - found.tokens), np.int32)
    replies = np.zeros((count, found.tokens), np.int32)
    lengths, counts = np.zeros((2, count), np.int32)
    for row, sample in enumerate(samples):
        reply = encode_prompt(tokenizer, sample.reply, add_special_tokens=False)[: found.tokens]
        lengths[row], counts[row] = len(sample.tokens), len(reply)
        prompts[row, : lengths[row]] = sample.tokens
        replies[row, : counts[row]] = reply

    def score(row: int, tokens: np.ndarray) -> float:
        ends = np.flatnonzero(tokens == tokenizer.eos_id)
        text = decode(tokens[: ends[0] if len(ends) else None].tolist())
        return found.score(text, samples[row].answers)

    marks = (np.arange(found.tokens) < counts[:, None]).astype(np.int32)
    parts = Split(prompts, lengths, replies, counts)
    return Case(task, parts, marks, True, Writing(found.tokens, score))


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
    report: Callable[[Method, Score], object] = lambda method, score: None,
) -> dict[str, Score]:
    """Score methods on a batch, next to the whole cache; some rows of it at once.

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
    found: dict[str, list[_Tally]] = {method.name: [] for method in methods}
    width = case.parts.prompts.shape[1] + case.parts.tokens.shape[1]
    at_once = max(1, _TOKENS_AT_ONCE // width)
    for start in range(0, len(case.answers), at_once):
        rows = case.rows(start, start + at_once)
        whole = _run(model, rows, Method(""))
        for method in methods:
            plain = method.compression is None and method.cache_dtype is None
            own = whole if plain else _run(model, rows, method)
            found[method.name].append(_tally(rows, whole, own))
    scores = {}
    for method in methods:
        scores[method.name] = _score(case.name, found[method.name])
        report(method, scores[method.name])
    return scores


def _run(model: Decoder, case: Case, method: Method) -> Replay:
    return replay(
        model,
        case.parts,
        compression=method.compression,
        cache_dtype=method.cache_dtype,
        write=case.writing.tokens if case.writing else 0,
    )


class _Tally(NamedTuple):
    """Sums over some rows of a case."""

    right: float
    asked: int
    kl: float
    same: float
    loss: float
    places: int
    cache_bytes: int
    whole_bytes: int


def _tally(case: Case, whole: Replay, found: Replay) -> _Tally:
    tokens, answers = case.parts.tokens, case.answers
    near = agreement(whole.logits, found.logits, answers)
    right, asked = 0.0, 0
    if case.writing:
        written = np.asarray(found.written)
        right, asked = sum(map(case.writing.score, range(len(written)), written)), len(written)
    elif case.has_answers:
        right, asked = exact_matches(found.logits, tokens, answers)
    loss, places = losses(found.logits, tokens, answers)
    near_sums = near.kl * places, near.top1 * places
    return _Tally(right, asked, *near_sums, loss, places, found.cache_bytes, whole.cache_bytes)


def _score(task: str, tallies: Sequence[_Tally]) -> Score:
    total = _Tally(*map(sum, zip(*tallies, strict=True)))
    return Score(
        task=task,
        accuracy=total.right / total.asked if total.asked else None,
        kl=total.kl / total.places,
        top1=total.same / total.places,
        loss=total.loss / total.places,
        cache_bytes=total.cache_bytes,
        bytes_ratio=total.cache_bytes / total.whole_bytes,
    )
