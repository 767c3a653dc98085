"""RULER's tracking and aggregation: variables handed on, common words, frequent coded words."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

from fusedkv_jax.evaluation.ruler import words
from fusedkv_jax.evaluation.ruler.story import NOISE, Draw, Story, depths, insert

_HOPS = 4
_LONG = 4096  # tokens; shorter samples repeat words less
_COMMON = 10

_VARIABLES = (
    "In the text below variables are given values, some of them by way of others. Keep track of "
    "them.\n\n{context}\nQuestion: Which variables have the value {value}? "
    "Answer: In the text {count} variables have the value {value}, which are"
)
_COMMON_WORDS = (
    "Here is a numbered list of words, some of which appear more often than others. Keep the most "
    "common ones in mind.\n{context}\nQuestion: Which 10 words appear most often in the list? "
    "Answer: The 10 words that appear most often in the list are:"
)
_CODED_WORDS = (
    "Here is a text in code. Count how often each coded word appears in it.\n{context}\n"
    "Question: Which three coded words appear most often, the dots '...' left aside? Answer with "
    "the words alone. Answer: The three coded words that appear most often are:"
)


def variable_tracking(draw: Draw) -> Story:
    """A value that is handed from variable to variable, after a solved example; a unit is noise."""
    first, value = draw.rng.choice(np.arange(10_000, 100_000), 2, replace=False).tolist()
    solved = _chain(draw.rng, first, letters=3)
    shown, reply = _tracked(solved, [NOISE] * 5), _listed(solved[1])
    chain = _chain(draw.rng, value, letters=5)

    def prompt(units: int) -> str:
        return f"{shown}{reply}\n\n{_tracked(chain, [NOISE] * units)}"

    return Story(prompt, tuple(chain[1]), _listed(chain[1]))


def _chain(
    rng: np.random.Generator, value: int, letters: int
) -> tuple[int, list[str], list[float]]:
    """The value, the variables that get it one from the other, and the assignments' depths."""
    names = _codes(rng, _HOPS + 1, letters, string.ascii_uppercase)
    return value, names, depths(rng, _HOPS + 1)


def _tracked(chain: tuple[int, list[str], list[float]], lines: Sequence[str]) -> str:
    value, names, places = chain
    first = f"VAR {names[0]} = {value}"
    rest = (f"VAR {new} = VAR {old}" for old, new in zip(names[:-1], names[1:], strict=True))
    context = "\n".join(insert(lines, [first, *rest], places))
    return _VARIABLES.format(context=context, value=value, count=len(names))


def _listed(names: Sequence[str]) -> str:
    return " " + " ".join(names)


def common_words(draw: Draw) -> Story:
    """Ten common words among rare ones, after a solved example; a unit is a rare word."""
    rng = draw.rng
    order = rng.permutation(len(words.SINGLES))
    singles = [words.SINGLES[i] for i in order.tolist()]
    pairs = rng.permutation(words.NUM_PAIRS).tolist()
    long, seed = draw.length >= _LONG, int(rng.integers(2**32))
    shown = singles[: 40 if long else 20]
    shown_text = _word_list(shown, *((10, 3) if long else (3, 1)), seed)
    solved = f"{_COMMON_WORDS.format(context=shown_text)}{_numbered(shown[:_COMMON])}"
    rest = singles[len(shown) :]
    common = rest[:_COMMON]

    def prompt(units: int) -> str:
        rare = rest[_COMMON : _COMMON + units]
        rare += [words.pair(pairs[i % len(pairs)]) for i in range(units - len(rare))]
        context = _word_list([*common, *rare], *((30, 3) if long else (6, 1)), seed)
        return f"{solved}\n\n{_COMMON_WORDS.format(context=context)}"

    return Story(prompt, tuple(common), _numbered(common), least=_COMMON)


def _word_list(chosen: Sequence[str], common: int, rare: int, seed: int) -> str:
    found = [*chosen[:_COMMON]] * common + [*chosen[_COMMON:]] * rare
    order = np.random.default_rng(seed).permutation(len(found)).tolist()
    return _numbered([found[i] for i in order])[1:]


def _numbered(chosen: Sequence[str]) -> str:
    return "".join(f" {i + 1}. {word}" for i, word in enumerate(chosen))


def frequent_words(draw: Draw) -> Story:
    """Coded words with the frequencies of a zeta distribution, exponent 2; a unit is a word.

    Of `units` words the k-th has units / (k^2 * zeta(2)), rounded down. The first is noise, and
    the next three are asked for.
    """
    rng = draw.rng
    vocabulary = ["...", *_codes(rng, max(10, draw.length // 50), 6, string.ascii_lowercase)]
    ranks = np.arange(1, len(vocabulary) + 1)
    seed, answers = int(rng.integers(2**32)), vocabulary[1:4]

    def prompt(units: int) -> str:
        counts = (units * 6 / (np.pi * ranks) ** 2).astype(int)
        found = np.repeat(np.arange(len(vocabulary)), counts)
        np.random.default_rng(seed).shuffle(found)
        return _CODED_WORDS.format(context=" ".join(vocabulary[i] for i in found.tolist()))

    # From 100 words on the fourth is more frequent than the fifth.
    return Story(prompt, tuple(answers), _listed(answers), least=100)


def _codes(rng: np.random.Generator, count: int, letters: int, alphabet: str) -> list[str]:
    """Different random words."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(alphabet[i] for i in rng.integers(0, 26, letters))] = None
    return list(found)
