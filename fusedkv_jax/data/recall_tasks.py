"""Recall tasks as in RULER (arXiv 2404.06654) and MQAR (arXiv 2312.04927), of any length.

An example is a haystack of facts and noise, then questions with their answers:

    single_needle      one fact in noise, one question
    multi_needle       eight facts in noise, all of them asked
    multi_key          facts up to half of the length, one question
    multi_query        the same, eight questions
    variable_tracking  four values, each handed from name to name; which names have each value?
    kv_recall          facts up to nearly half of the length, up to 32 of them asked

The same numbers always make the same example.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from fusedkv_jax.data.recall_forms import Form
from fusedkv_jax.validation import check_count, nearest_or_all

HOPS = 4
CHAINS = 4
QUESTIONS = 8
KV_QUESTIONS = 32
DRILL = "drill"  # for training alone: few or many facts, asked again and again


@dataclasses.dataclass(frozen=True)
class Examples:
    """A batch of examples of one task.

    Attributes:
      tokens: [B, L] int32, haystack, questions and answers.
      context: [B] int32, length of the haystack; the questions begin there.
      answers: [B, L] int32, 0 where no answer is, else which answer of its row (1, 2, ...) the
        token belongs to.
    """

    tokens: np.ndarray
    context: np.ndarray
    answers: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Story:
    """Facts in groups whose inner order holds, and questions with their answers, as token ids."""

    groups: list[list[list[int]]]
    questions: list[tuple[list[int], list[list[int]]]]


def names() -> tuple[str, ...]:
    """The tasks of the suite."""
    return tuple(name for name in _STORIES if name != DRILL)


def check(task: str) -> None:
    """Raise ValueError, with the nearest names, unless `task` is one of `names()`."""
    if task not in names():
        raise ValueError(f"task={task} is unknown{nearest_or_all(task, names())}")


def make(task: str, form: Form, *, length: int, count: int, seed: int = 0) -> Examples:
    """Write examples of a task.

    Args:
      task: one of `names()`.
      form: how facts are written.
      length: tokens of each example, answers included.
      count: number of examples B.
      seed: which examples.

    Raises:
      ValueError: an unknown task, one that does not fit into the length, no length or count, or
        a negative seed.
    """
    check(task)
    for name, value, least in (("length", length, 1), ("count", count, 1), ("seed", seed, 0)):
        check_count(name, value, least=least)
    number = names().index(task)
    rows = [
        example(task, form, length, np.random.default_rng((seed, number, length, i)))
        for i in range(count)
    ]
    tokens, context, answers = zip(*rows, strict=True)
    return Examples(np.stack(tokens), np.array(context, np.int32), np.stack(answers))


def example(
    task: str, form: Form, length: int, rng: np.random.Generator
) -> tuple[np.ndarray, int, np.ndarray]:
    """One example of a task or of `DRILL`: a row of each field of `Examples`.

    Raises:
      ValueError: it does not fit into the length.
    """
    story = _STORIES[task](form, length, rng)
    tail, answers = _tail(form, story)
    facts = _interleave(story.groups, rng)
    begin = form.begin()
    room = length - len(begin) - len(tail) - sum(map(len, facts))
    if room < 0:
        raise ValueError(
            f"length={length} is too short for {task}, which needs {length - room} tokens here; "
            "use longer examples"
        )
    places = np.sort(rng.integers(0, room + 1, len(facts)))
    noise = form.noise(rng, room)
    parts = [begin]
    for start, end, fact in zip([0, *places], places, facts, strict=False):
        parts += [noise[start:end], fact]
    parts += [noise[places[-1] :], tail]
    tokens = np.concatenate(parts).astype(np.int32)
    marks = np.zeros(length, np.int32)
    marks[length - len(tail) :] = answers
    return tokens, length - len(tail), marks


def _tail(form: Form, story: _Story) -> tuple[list[int], list[int]]:
    """The questions with their answers, and which answer each of their tokens belongs to."""
    tail, marks, number = form.ask(), [0] * len(form.ask()), 0
    for question, answers in story.questions:
        tail += question
        marks += [0] * len(question)
        for answer in answers:
            number += 1
            tail += answer
            marks += [number] * len(answer)
    return tail, marks


def _interleave(groups: list[list[list[int]]], rng: np.random.Generator) -> list[list[int]]:
    """All facts in random order, those of one group in their own."""
    order = rng.permutation(np.repeat(np.arange(len(groups)), [len(group) for group in groups]))
    left = [iter(group) for group in groups]
    return [next(left[group]) for group in order]


def _lookup(
    form: Form,
    rng: np.random.Generator,
    facts: int,
    questions: int,
    room: int | None = None,
    least: int = 1,
) -> _Story:
    """Facts with different keys, some of which are asked; no more of them, but for the least number
    of facts, than have room with their questions."""
    facts = min(facts, form.num_keys)
    keys = rng.choice(form.num_keys, facts, replace=False).tolist()
    values = rng.integers(0, form.num_values, facts).tolist()
    order = rng.permutation(facts).tolist()
    told = [form.fact(key, value) for key, value in zip(keys, values, strict=True)]
    asked = [(form.question(keys[i]), [form.value(values[i])]) for i in order[:questions]]
    if room is not None:
        sizes = np.array([len(told[i]) for i in order])
        sizes[: len(asked)] += [len(question) + len(value) for question, (value,) in asked]
        kept = max(least, int((sizes.cumsum() <= room).sum()))
        told, asked = [told[i] for i in sorted(order[:kept])], asked[:kept]
    return _Story([[fact] for fact in told], asked)


def _fill(
    form: Form,
    length: int,
    rng: np.random.Generator,
    share: float,
    questions: int,
    least: int = 1,
) -> _Story:
    """Facts that take up a share of the length, fewer where they are longer than the first."""
    facts = max(1, int(length * share) // len(form.fact(0, 0)))
    room = length - len(form.begin()) - len(form.ask())
    return _lookup(form, rng, facts, questions, room, least)


def _single_needle(form: Form, length: int, rng: np.random.Generator) -> _Story:
    return _lookup(form, rng, 1, 1)


def _multi_needle(form: Form, length: int, rng: np.random.Generator) -> _Story:
    return _lookup(form, rng, QUESTIONS, QUESTIONS)


def _multi_key(form: Form, length: int, rng: np.random.Generator) -> _Story:
    return _fill(form, length, rng, 1 / 2, 1)


def _multi_query(form: Form, length: int, rng: np.random.Generator) -> _Story:
    return _fill(form, length, rng, 1 / 2, QUESTIONS, least=QUESTIONS)


def _kv_recall(form: Form, length: int, rng: np.random.Generator) -> _Story:
    # The questions take as much room as the facts.
    return _fill(form, length, rng, 0.45, KV_QUESTIONS)


def _drill(form: Form, length: int, rng: np.random.Generator) -> _Story:
    """2 facts up to half of the length; questions until the length is used up."""
    pair = len(form.fact(0, 0))
    room = (length - len(form.ask())) // pair
    most = min(form.num_keys, room // 2)
    facts = int(2 ** rng.uniform(1, np.log2(most)))
    story = _lookup(form, rng, facts, facts)
    asked = rng.integers(0, facts, room - facts)
    return _Story(story.groups, [story.questions[i] for i in asked])


def _variable_tracking(form: Form, length: int, rng: np.random.Generator) -> _Story:
    keys = rng.choice(form.num_keys, (CHAINS, HOPS), replace=False).tolist()
    values = rng.choice(form.num_values, CHAINS, replace=False).tolist()
    groups = [
        [form.start(chain[0], value)] + [form.copy(chain[i], chain[i - 1]) for i in range(1, HOPS)]
        for chain, value in zip(keys, values, strict=True)
    ]
    questions = [
        (form.trace(value), [form.name(key) for key in chain])
        for chain, value in zip(keys, values, strict=True)
    ]
    return _Story(groups, [questions[i] for i in rng.permutation(CHAINS)])


_STORIES: dict[str, Callable[[Form, int, np.random.Generator], _Story]] = {
    "single_needle": _single_needle,
    "multi_needle": _multi_needle,
    "multi_key": _multi_key,
    "multi_query": _multi_query,
    "variable_tracking": _variable_tracking,
    "kv_recall": _kv_recall,
    DRILL: _drill,
}
