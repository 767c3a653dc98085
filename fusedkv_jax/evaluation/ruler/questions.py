"""RULER's question answering: the documents that answer a question among others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from fusedkv_jax.evaluation.ruler.story import Draw, Story

_TASK = "Answer the question from the documents {where}. Write the answer alone."
_PROMPT = "{above}\n\n{documents}\n\n{below}\n\nQuestion: {question} Answer:"


def question_answering(dataset: Literal["squad", "hotpotqa"]) -> Callable[[Draw], Story]:
    """The task on a data set; a unit is a document."""

    def begin(draw: Draw) -> Story:
        rng, data = draw.rng, draw.material.squad if dataset == "squad" else draw.material.hotpotqa
        assert data is not None  # `make` has checked it
        count = len(data.questions)
        if draw.number >= count:
            raise ValueError(f"{dataset} has {count} questions; ask for fewer examples")
        # One order for all samples, so that no question comes twice.
        order = np.random.default_rng(draw.seed).permutation(count)
        question = data.questions[order[draw.number]]
        gold, near = question.documents, question.related
        own = {*gold, *near}
        far = [i for i in rng.permutation(len(data.documents)).tolist() if i not in own]
        others = [near[i] for i in rng.permutation(len(near))] + far or list(gold)
        seed = int(rng.integers(2**32))

        def prompt(units: int) -> str:
            chosen = [*gold, *(others[i % len(others)] for i in range(units - len(gold)))]
            np.random.default_rng(seed).shuffle(chosen)
            texts = (
                f"Document {i + 1}:\n{data.documents[place]}" for i, place in enumerate(chosen)
            )
            return _PROMPT.format(
                above=_TASK.format(where="below"),
                documents="\n\n".join(texts),
                below=_TASK.format(where="above"),
                question=question.text,
            )

        return Story(prompt, question.answers, f" {question.answers[0]}", least=len(gold))

    return begin
