"""RULER's needles in a haystack: facts hidden in noise, in essays, or among other facts."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import uuid
from collections.abc import Sequence
from typing import Literal

import numpy as np

from fusedkv_jax.evaluation.ruler import words
from fusedkv_jax.evaluation.ruler.story import NOISE, Draw, Story, depths, insert

Haystack = Literal["noise", "essay", "needle"]
Kind = Literal["word", "number", "uuid"]

_NEEDLE = "The secret {kind} of {key} is {value}."
_PROMPT = (
    "The text below tells {some} in passing. Keep {it} in mind; a question about {it} follows.\n"
    "{context}\n"
    "Which secret {kinds} of {query} does the text tell? "
    "The secret {kinds} of {query} in the text {verb}"
)
_SENTENCES = re.compile(r"(?<=[.!?])\s+")


@dataclasses.dataclass(frozen=True)
class Needles:
    """A task of this kind, called to begin a sample.

    Attributes:
      haystack: what the needles lie in; its unit is a line, or a word of the essays.
      key, value: what is told, of what.
      keys: different keys among the needles.
      values: values of each key.
      queries: keys that are asked for.
    """

    haystack: Haystack
    key: Kind = "word"
    value: Kind = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def __call__(self, draw: Draw) -> Story:
        rng = draw.rng
        keys = _different(self.key, self.keys, rng)
        values = _different(self.value, self.keys * self.values, rng)
        facts = list(zip(np.repeat(keys, self.values).tolist(), values, strict=True))
        needles = [self._needle(*facts[i]) for i in rng.permutation(len(facts))]
        places, others = depths(rng, len(needles)), int(rng.integers(2**32))
        asked = [keys[i] for i in rng.permutation(self.keys)[: self.queries]]
        answers = tuple(value for key in asked for own, value in facts if own == key)

        def prompt(units: int) -> str:
            if self.haystack == "essay":
                found = itertools.islice(itertools.cycle(draw.material.essays), units)
                lines, separator = _SENTENCES.split(" ".join(found)), " "
            elif self.haystack == "noise":
                lines, separator = [NOISE] * units, "\n"
            else:
                lines, separator = self._distractors(units, keys, others), "\n"
            return self._ask(separator.join(insert(lines, needles, places)), asked, len(answers))

        return Story(prompt, answers, " " + ", ".join(answers))

    def _needle(self, key: str, value: str) -> str:
        return _NEEDLE.format(kind=self.value, key=key, value=value)

    def _ask(self, context: str, asked: Sequence[str], answers: int) -> str:
        one = answers == 1
        kinds = self.value if one else f"{self.value}s"
        return _PROMPT.format(
            some=f"a secret {kinds}" if one else f"some secret {kinds}",
            it="it" if one else "them",
            kinds=kinds,
            context=context,
            query=f"{', '.join(asked[:-1])} and {asked[-1]}" if len(asked) > 1 else asked[0],
            verb="is" if one else "are",
        )

    def _distractors(self, count: int, keys: Sequence[str], seed: int) -> list[str]:
        """Needles of other keys; the first ones are the same whatever the count."""
        of_keys, of_values = np.random.default_rng((seed, 0)), np.random.default_rng((seed, 1))
        if self.key == "word":
            order = of_keys.permutation(words.NUM_PAIRS).tolist()
            others = itertools.cycle(word for i in order if (word := words.pair(i)) not in keys)
        else:
            others = _stream(self.key, count, of_keys)
        values = _stream(self.value, count, of_values)
        facts = zip(itertools.islice(others, count), values, strict=True)
        return [self._needle(*fact) for fact in facts]


def _different(kind: Kind, count: int, rng: np.random.Generator) -> list[str]:
    if kind == "word":
        chosen = rng.choice(words.NUM_PAIRS, count, replace=False)
        return [words.pair(int(number)) for number in chosen]
    found: dict[str, None] = {}
    while len(found) < count:
        found |= dict.fromkeys(_stream(kind, count - len(found), rng))
    return list(found)


def _stream(kind: Kind, count: int, rng: np.random.Generator) -> list[str]:
    """Numbers of seven digits, or UUIDs (version 4)."""
    if kind == "number":
        return [str(number) for number in rng.integers(10**6, 10**7, count).tolist()]
    data = rng.bytes(16 * count)
    make = functools.partial(uuid.UUID, version=4)
    return [str(make(bytes=data[i : i + 16])) for i in range(0, len(data), 16)]
