"""RULER's thirteen tasks (arXiv 2404.06654): samples of any length for any tokenizer, and scores.

Names, kinds of samples, tokens to write and scores are those of https://github.com/NVIDIA/RULER.
The prompts are worded anew and the words come from lists of our own, so that scores compare models
measured here, and published ones only roughly. Samples depend on the tokenizer, the length and
the seed, never on the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fusedkv_jax.data.encoding import encode_prompt
from fusedkv_jax.data.tokenizers import Tokenizer
from fusedkv_jax.evaluation.ruler.counting import common_words, frequent_words, variable_tracking
from fusedkv_jax.evaluation.ruler.material import (
    Material,
    read_essays,
    read_hotpotqa,
    read_squad,
)
from fusedkv_jax.evaluation.ruler.needles import Needles
from fusedkv_jax.evaluation.ruler.questions import question_answering
from fusedkv_jax.evaluation.ruler.story import Draw, Story, most_units
from fusedkv_jax.validation import check_count, nearest_or_all

ALL = "ruler"  # stands for all tasks


def string_match_all(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that the text contains, in either case."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def string_match_part(text: str, answers: Sequence[str]) -> float:
    """1 if the text contains any of the answers, in either case, else 0."""
    return float(any(answer.lower() in text.lower() for answer in answers))


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      begin: begins a sample.
      tokens: that the model may write.
      score: of a text and the right answers, 0 to 1.
      needs: the field of `Material` that it reads, or None.
    """

    begin: Callable[[Draw], Story]
    tokens: int = 128
    score: Callable[[str, Sequence[str]], float] = string_match_all
    needs: str | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sample.

    Attributes:
      prompt: text.
      tokens: [T] int32, the prompt with the tokenizer's BOS token.
      answers: what is right.
      reply: how a text that answers goes on.
      units: of the haystack.
    """

    prompt: str
    tokens: np.ndarray
    answers: tuple[str, ...]
    reply: str
    units: int


def _essay(**options: int | str) -> Task:
    return Task(Needles("essay", **options), needs="essays")  # pyright: ignore[reportArgumentType]


TASKS: dict[str, Task] = {
    "niah_single_1": Task(Needles("noise")),
    "niah_single_2": _essay(),
    "niah_single_3": _essay(value="uuid"),
    "niah_multikey_1": _essay(keys=4),
    "niah_multikey_2": Task(Needles("needle")),
    "niah_multikey_3": Task(Needles("needle", key="uuid", value="uuid")),
    "niah_multivalue": _essay(values=4),
    "niah_multiquery": _essay(keys=4, queries=4),
    "vt": Task(variable_tracking, tokens=30),
    "cwe": Task(common_words, tokens=120),
    "fwe": Task(frequent_words, tokens=50),
    "qa_1": Task(question_answering("squad"), 32, string_match_part, "squad"),
    "qa_2": Task(question_answering("hotpotqa"), 32, string_match_part, "hotpotqa"),
}


def expand(tasks: Sequence[str]) -> tuple[str, ...]:
    """Names of tasks, with all of these for "ruler"; other names stay as they are."""
    found = (TASKS if task == ALL else [task] for task in tasks)
    return tuple(dict.fromkeys(name for names in found for name in names))


def check_files(tasks: Sequence[str], **paths: str | None) -> None:
    """Raise ValueError if a task needs a file that is not named; arguments as `load_material`."""
    for task in tasks:
        if task in TASKS:
            _check_needs(task, paths)


def _check_needs(task: str, given: Mapping[str, object]) -> None:
    """Raise ValueError unless what a task needs is given, by its name in `Material`."""
    name = TASKS[task].needs
    if name and not given.get(name):
        what = "a file or folder of text" if name == "essays" else "its JSON file"
        raise ValueError(f"task {task} needs --{name}, {what}; or leave the task out")


def _check(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"task={task} is unknown{nearest_or_all(task, TASKS)}")


def load_material(tasks: Sequence[str], **paths: str | None) -> Material:
    """Read what tasks need.

    Args:
      tasks: names in `TASKS`.
      **paths: essays (a file or folder of text), squad and hotpotqa (their JSON files).

    Raises:
      ValueError, FileNotFoundError: an unknown task, or a path that is missing or cannot be read.
    """
    for task in tasks:
        _check(task)
    check_files(tasks, **paths)
    readers = {"essays": read_essays, "squad": read_squad, "hotpotqa": read_hotpotqa}
    needed = {TASKS[task].needs for task in tasks}
    return Material(**{name: readers[name](paths[name]) for name in readers if name in needed})


def make(
    task: str,
    tokenizer: Tokenizer,
    *,
    length: int,
    count: int,
    seed: int = 0,
    material: Material | None = None,
) -> list[Sample]:
    """Write samples: as much haystack as leaves room for the tokens that the model may write.

    Args:
      task: one of `TASKS`.
      tokenizer: of the model.
      length: tokens of the prompt and of what the model may write.
      count: number of samples.
      seed: which samples.
      material: what the task needs, see `load_material`.

    Raises:
      ValueError: an unknown task, one whose material is missing or that does not fit into the
        length, no length or count, or a negative seed.
    """
    _check(task)
    for name, value, least in (("length", length, 1), ("count", count, 1), ("seed", seed, 0)):
        check_count(name, value, least=least)
    material = material or Material()
    _check_needs(task, vars(material))
    found, room = TASKS[task], length - TASKS[task].tokens
    samples = []
    for number in range(count):
        key = (seed, list(TASKS).index(task), length, number)
        draw = Draw(np.random.default_rng(key), number, seed, length, material)
        story = found.begin(draw)
        try:
            units = most_units(
                lambda units, story=story: len(encode_prompt(tokenizer, story.prompt(units))),
                room,
                story.least,
            )
        except ValueError as error:
            raise ValueError(
                f"length={length} is too short for {task}: beside {found.tokens} tokens to write, "
                f"{error}"
            ) from None
        text = story.prompt(units)
        tokens = np.asarray(encode_prompt(tokenizer, text), np.int32)
        samples.append(Sample(text, tokens, story.answers, story.reply, units))
    return samples
