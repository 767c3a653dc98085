"""Least squares from sums over tokens, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array

# How firmly a matrix stays where it was, relative to the mean square of its inputs.
RIDGE = 0.01
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # to choose from, on tokens that are held out


class Moments(NamedTuple):
    """Sums over tokens of products of inputs [I] and targets [O].

    Attributes:
        gram: [I, I], of inputs with themselves.
        cross: [I, O], of inputs with targets.
        power: of targets with themselves, summed over O.
    """

    gram: np.ndarray
    cross: np.ndarray
    power: float

    def plus(self, other: Moments) -> Moments:
        """The sums over both's tokens."""
        return Moments(self.gram + other.gram, self.cross + other.cross, self.power + other.power)

    def error(self, matrix: np.ndarray) -> float:
        """The squared error of `inputs @ matrix`, summed over tokens."""
        explained = 2 * np.sum(matrix * self.cross) - np.sum(matrix * (self.gram @ matrix))
        return self.power - float(explained)


def moments(inputs: Array, targets: Array) -> Moments:
    """Those of tokens [..., I] and [..., O]."""
    gram, cross, power = _products(inputs, targets)
    return Moments(np.asarray(gram, np.float64), np.asarray(cross, np.float64), float(power))


@jax.jit
def _products(inputs: Array, targets: Array) -> tuple[Array, Array, Array]:
    x, y = (array.reshape(-1, array.shape[-1]).astype("float32") for array in (inputs, targets))
    return x.T @ x, x.T @ y, (y * y).sum()


def total(parts: Iterable[Moments]) -> Moments:
    """The sums over the tokens of all parts."""
    first, *others = parts
    for other in others:
        first = first.plus(other)
    return first


def nearest(
    parts: list[Moments], held_out: int, start: np.ndarray, ridge: float | None = None
) -> np.ndarray:
    """The matrix [I, O] with `inputs @ matrix = targets`, held near `start`.

    Args:
        parts: sums over parts of the tokens.
        held_out: how many parts, the last ones, choose the ridge; the matrix is then fitted to all.
        start: the matrix as it was.
        ridge: instead of choosing one. Without both it is `RIDGE`.
    """
    start = start.astype(np.float64)
    if ridge is None and held_out:
        fitted, others = total(parts[:-held_out]), total(parts[-held_out:])
        errors = [others.error(_solved(fitted, start, one)) for one in RIDGES]
        ridge = RIDGES[int(np.argmin(errors))]
    return _solved(total(parts), start, RIDGE if ridge is None else ridge)


def _solved(sums: Moments, start: np.ndarray, ridge: float) -> np.ndarray:
    return start + regularized(sums.gram, sums.cross - sums.gram @ start, ridge)


def regularized(gram: np.ndarray, cross: np.ndarray, ridge: float) -> np.ndarray:
    """(gram + ridge * mean of its diagonal)^-1 cross."""
    size = len(gram)
    return np.linalg.solve(gram + ridge * np.trace(gram) / size * np.eye(size), cross)
