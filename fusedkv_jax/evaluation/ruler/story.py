"""A sample whose haystack may have any size, and the largest that fits into a length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from fusedkv_jax.evaluation.ruler.material import Material

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DEPTHS = 40  # places of a needle, evenly spaced from the beginning to the end
_PROBE = 16  # units that show what a unit costs


@dataclasses.dataclass(frozen=True)
class Draw:
    """Which sample of a task is made.

    Attributes:
      rng: of this sample alone.
      number: of the sample.
      seed: which samples.
      length: tokens of the sample.
      material: what the task needs.
    """

    rng: np.random.Generator
    number: int
    seed: int
    length: int
    material: Material


@dataclasses.dataclass(frozen=True)
class Story:
    """One sample before the size of its haystack is chosen.

    Attributes:
      prompt: the text with so many units of haystack; equal numbers give equal texts.
      answers: what the model should write.
      reply: how a text that answers goes on, from the prompt's last character.
      least: fewest units.
    """

    prompt: Callable[[int], str]
    answers: tuple[str, ...]
    reply: str
    least: int = 1


def depths(rng: np.random.Generator, count: int) -> list[float]:
    """Where needles lie: `count` different depths, 0 the beginning and 1 the end, rising."""
    places = np.sort(rng.choice(_DEPTHS, count, replace=False)) / (_DEPTHS - 1)
    return places.tolist()


def insert(units: Sequence[str], needles: Sequence[str], places: Sequence[float]) -> list[str]:
    """Units with each needle at its depth; `places` rise."""
    found, start = [], 0
    for needle, place in zip(needles, places, strict=True):
        stop = int(place * len(units))
        found += [*units[start:stop], needle]
        start = stop
    return [*found, *units[start:]]


def most_units(size: Callable[[int], int], room: int, least: int) -> int:
    """The largest number of units that has room: `size` of it is at most `room`, of one more not.

    Searches by interpolation and bisection in turns: texts of a hundred thousand tokens take a
    moment to encode, and units have nearly the same length.

    Args:
      size: tokens of the prompt with so many units.
      room: tokens that the prompt may have.
      least: fewest units.

    Raises:
      ValueError: not even those have room.
    """
    fits, tokens = least, size(least)
    if tokens > room:
        raise ValueError(f"{tokens} tokens are needed and there is room for {room}")
    first, over, bisect = tokens, None, False
    while over is None or over[0] - fits > 1:
        if over is None:
            cost = (tokens - first) / max(1, fits - least)  # of a unit
            guess = fits + (int((room - tokens) / cost) + 1 if cost > 0 else fits + _PROBE)
        else:
            share = 0.5 if bisect else (room - tokens) / (over[1] - tokens)
            guess = fits + int(share * (over[0] - fits))
            guess = min(max(guess, fits + 1), over[0] - 1)
            bisect = not bisect
        found = size(guess)
        if found <= room:
            fits, tokens = guess, found
        else:
            over = guess, found
    return fits
