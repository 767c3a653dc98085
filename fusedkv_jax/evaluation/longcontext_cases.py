"""The long-context cases of a model: recall in the form that it was trained on, RULER's tasks, and
held-out text."""

import dataclasses

import numpy as np

from fusedkv_jax import data
from fusedkv_jax.data import recall_tasks, tokenizers
from fusedkv_jax.data.recall import RecallSequences
from fusedkv_jax.data.recall_forms import TextForm, TokenForm
from fusedkv_jax.data.sources import RECALL
from fusedkv_jax.evaluation import ruler
from fusedkv_jax.evaluation.longcontext import (
    Case,
    Question,
    equal_shapes,
    recall_case,
    ruler_case,
    text_case,
)
from fusedkv_jax.training import ExperimentConfig
from fusedkv_jax.validation import nearest_or_all, validate

TEXT = "text"
CONTINUATION = 64  # at most: half of a short text


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongContextSettings:
    """What is evaluated.

    Attributes:
      tasks: names of recall tasks and of RULER's ("ruler" for all of these), and "text": held-out
        text of the run, whose last tokens are predicted; empty for recall and text as they suit
        the run.
      length: tokens of an example.
      examples: examples of each task.
      seed: which examples.
      question: "inside" the prompt that is compressed, or "after" it; RULER's is inside.
      essays: file or folder of text, which some of RULER's tasks hide needles in.
      squad, hotpotqa: JSON files of these data sets, for qa_1 and qa_2.

    Raises:
      ValueError: an unknown task, a file that a task needs and that is not named, RULER's tasks
        asked after the prompt, or a value of the wrong type or out of bounds.
    """

    tasks: tuple[str, ...] = ()
    length: int = 512
    examples: int = 32
    seed: int = 0
    question: Question = "inside"
    essays: str | None = None
    squad: str | None = None
    hotpotqa: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", ruler.expand(self.tasks))
        validate(self, ValueError, least={"length": 2, "examples": 1, "seed": 0})
        for task in self.tasks:
            if task in ruler.TASKS:
                if self.question != "inside":
                    raise ValueError(f"question={self.question}: {task} asks inside the prompt")
            else:
                _check(task)
        ruler.check_files(self.tasks, **self.files)

    @property
    def files(self) -> dict[str, str | None]:
        """Paths of what RULER's tasks read."""
        return {"essays": self.essays, "squad": self.squad, "hotpotqa": self.hotpotqa}


def _check(task: str) -> None:
    known = (*recall_tasks.names(), TEXT, ruler.ALL, *ruler.TASKS)
    if task not in known:
        raise ValueError(f"task={task} is unknown{nearest_or_all(task, known)}")


def default_tasks(config: ExperimentConfig, heldout: bool = True) -> tuple[str, ...]:
    """All recall tasks; and text, for a model that was trained on text and has some held out."""
    text = heldout and config.data.source != RECALL
    return recall_tasks.names() + ((TEXT,) if text else ())


def cases(config: ExperimentConfig, settings: LongContextSettings) -> list[Case]:
    """The texts of every task, in the form that the model was trained on; RULER's last.

    Raises:
      ValueError: a length that the model or a task cannot have, or too little held-out text.
    """
    limit = config.model.max_length
    if not 1 < settings.length <= limit:
        raise ValueError(f"length={settings.length}; use 2 to the model's max_length={limit}")
    rulers = [task for task in settings.tasks if task in ruler.TASKS]
    tokenizer = tokenizers.load(config.data.tokenizer)
    if config.data.source == RECALL:
        tokenizers.check_vocab_size(tokenizer, config.model.vocab_size)
        form = TokenForm(tokenizer.vocab_size)  # which the model was trained on, if it has more
        if rulers:
            raise ValueError(f"task {rulers[0]} is text, and a run on {RECALL!r} knows none")
    else:
        form = TextForm(tokenizer)
    size = {"length": settings.length, "count": settings.examples}
    others = [
        _text(config, settings)
        if task == TEXT
        else recall_case(task, form, seed=settings.seed, question=settings.question, **size)
        for task in settings.tasks
        if task not in ruler.TASKS
    ]
    found = equal_shapes(others) if others else []
    material = ruler.load_material(rulers, **settings.files)
    for task in rulers:
        case = ruler_case(task, tokenizer, seed=settings.seed, material=material, **size)
        found.append(case)
    return found


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
