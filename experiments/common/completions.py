"""Completions of texts, with errors that count prompts as the output does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import fusedkv_jax as fkv
from fusedkv_jax.data import Tokenizer
from fusedkv_jax.generation import PromptError


def continue_texts(
    model: fkv.Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    params: fkv.SamplingParams,
    **settings: Any,
) -> list[fkv.Completion]:
    """Completions of texts, as `fusedkv_jax.generate` gives them.

    Raises:
      ValueError: an empty prompt, or one that leaves no room for output in the model's context.
    """
    with counted_from_one(prompts):
        return fkv.generate(model, list(prompts), params, tokenizer=tokenizer, **settings)


@contextlib.contextmanager
def counted_from_one(prompts: Sequence[str]) -> Iterator[None]:
    """Errors within it count prompts as the output does.

    Raises:
      ValueError: an empty prompt.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; give --prompt at least one character")
    try:
        yield
    except PromptError as error:
        if error.number is None:
            raise
        raise ValueError(f"prompt {error.number + 1} {error.reason}") from None
