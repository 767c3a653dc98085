"""What RULER's samples are made of that is not made here: essays, and questions with documents."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fusedkv_jax.data import sources
from fusedkv_jax.validation import nearest


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of a data set.

    Attributes:
      text: the question.
      answers: any of them is right.
      documents: numbers of those that answer it.
      related: numbers of others on the same subject, which come before unrelated ones.
    """

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Questions:
    """A data set of questions and the documents that they are about."""

    questions: Sequence[Question]
    documents: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Material:
    """Texts by what they are for.

    Attributes:
      essays: words of the essays; none where they are not needed.
      squad, hotpotqa: the data sets, or None where they are not needed.
    """

    essays: Sequence[str] = ()
    squad: Questions | None = None
    hotpotqa: Questions | None = None


def read_essays(source: str) -> list[str]:
    """The words of a text file, a folder of them, or a file of JSON lines with a field `text`.

    Raises:
      ValueError, FileNotFoundError: it cannot be read, or has no words.
    """
    documents = sources.read_all(sources.list_files([source]))
    found = list(itertools.chain.from_iterable(document.text.split() for document in documents))
    if not found:
        raise ValueError(f"{source} has no words")
    return found


def read_squad(path: str) -> Questions:
    """Questions of SQuAD 2.0's JSON file that have an answer, and all paragraphs.

    Raises:
      ValueError: no such file, one of another form, or a question without answers.
    """

    def read(content: Any) -> Questions:
        articles = [
            [(part["context"], part["qas"]) for part in article["paragraphs"]]
            for article in content["data"]
        ]
        number = _numbers(context for article in articles for context, _ in article)
        questions = []
        for article in articles:
            own = dict.fromkeys(number[context] for context, _ in article)
            for context, asked in article:
                place = number[context]
                related = tuple(other for other in own if other != place)
                questions += [
                    Question(
                        _text(each["question"]),
                        _answers(answer["text"] for answer in each["answers"]),
                        (place,),
                        related,
                    )
                    for each in asked
                    if not each.get("is_impossible", False)
                ]
        return Questions(questions, list(number))

    return _read(path, "SQuAD", read)


def read_hotpotqa(path: str) -> Questions:
    """Questions of HotpotQA's JSON file (distractor setting), and all its paragraphs.

    Raises:
      ValueError: no such file, one of another form, or a question without answers.
    """

    def read(content: Any) -> Questions:
        contexts = [
            [f"{_text(title)}\n{''.join(sentences)}" for title, sentences in each["context"]]
            for each in content
        ]
        number = _numbers(itertools.chain.from_iterable(contexts))
        questions = [
            Question(
                _text(each["question"]),
                _answers([each["answer"]]),
                tuple(dict.fromkeys(number[context] for context in own)),
            )
            for each, own in zip(content, contexts, strict=True)
        ]
        return Questions(questions, list(number))

    return _read(path, "HotpotQA", read)


def _numbers(texts: Any) -> dict[str, int]:
    """Different texts, numbered as they come."""
    return {_text(text): number for number, text in enumerate(dict.fromkeys(texts))}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} instead of a text")
    return value


def _answers(values: Iterable[Any]) -> tuple[str, ...]:
    """Different answers; blank ones, which any text contains, are none."""
    return tuple(dict.fromkeys(text for text in map(_text, values) if text.strip()))


def _read(path: str, name: str, read: Callable[[Any], Questions]) -> Questions:
    place = pathlib.Path(path).expanduser()
    why = sources.why_not_a_file(place)
    if why:
        raise ValueError(f"{path}: {why}")
    try:
        content = place.read_bytes()
    except FileNotFoundError:
        beside = place.parent.iterdir() if place.parent.is_dir() else ()
        near = nearest(place.name, (file.name for file in beside))
        advice = near or f"; name {name}'s JSON file"
        raise ValueError(f"no such file or folder {path!r}{advice}") from None
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ValueError(f"{path} cannot be read ({why}); name {name}'s JSON file") from None
    try:
        found = read(json.loads(content))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
        raise ValueError(f"{path} is not {name}'s JSON file: {what}") from None
    if not found.questions or not all(question.answers for question in found.questions):
        raise ValueError(f"{path} is not {name}'s JSON file: questions without answers")
    return found
