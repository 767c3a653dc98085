"""Where a prompt is cut for prefill in parts (KV-Runahead, arXiv 2405.05329)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

Parts = Literal["equal", "balanced"] | Sequence[float]

TILE = 128  # cuts are multiples of it where the prompt is long enough


def part_ends(length: int, workers: int, parts: Parts, tile: int = TILE) -> tuple[int, ...]:
    """Where each worker's part of a prompt ends.

    With `balanced`, part i ends at length * sqrt((i + 1) / workers): all parts see as many (query,
    key) pairs, if attention skips what is masked. `equal` parts hand fewer tokens on, and have as
    many rows in projections and feed-forward. Numbers are relative sizes of the parts, or
    their tokens.

    Args:
        length: tokens of the prompt, padding included.
        workers: number of parts.
        parts: how to cut.
        tile: inner ends of the named cuts are multiples of it, halved until every part has one.

    Returns:
        Increasing ends; the last one is `length`.

    Raises:
        ValueError: fewer tokens than workers, or sizes that are not `workers` positive numbers.
    """
    if length < workers:
        raise ValueError(f"{length} tokens cannot be cut into {workers} parts; use fewer workers")
    shares = _shares(workers, parts)
    if not isinstance(parts, str):
        tile = 1
    while tile * workers > length:
        tile //= 2
    ends: list[int] = []
    for i, share in enumerate(shares[:-1]):
        # At least a tile after the last end, and so that a tile is left for all that follow.
        most = (length - 1) // tile - (workers - 2 - i)
        least = (ends[-1] // tile if ends else 0) + 1
        ends.append(tile * min(max(round(length * share / tile), least), most))
    return (*ends, length)


def _shares(workers: int, parts: Parts) -> list[float]:
    """Ends of the parts as shares of the whole."""
    if parts == "equal":
        return [(i + 1) / workers for i in range(workers)]
    if parts == "balanced":
        return [math.sqrt((i + 1) / workers) for i in range(workers)]
    sizes = [] if isinstance(parts, str) else list(parts)
    if len(sizes) != workers or not all(size > 0 for size in sizes):
        raise ValueError(
            f"prefill_parts={parts!r}; use equal, balanced, or {workers} positive sizes, one for"
            f" each place of mesh.context={workers}"
        )
    return [total / sum(sizes) for total in itertools.accumulate(sizes)]
