"""A plan as arrays: who computes which tokens, in the two lanes of a step."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

import numpy as np

from fusedkv_jax.cache.paged import Lane
from fusedkv_jax.serving.plan import StepPlan
from fusedkv_jax.serving.shapes import StepShapes


class StepArrays(NamedTuple):
    """The arrays of one step.

    Attributes:
        tokens: int32 new tokens, lane after lane, [N].
        lanes: pages and positions of their rows.
        sampled: int32 numbers of the tokens whose logits are wanted, padded with -1, [S].
        rows: places in the plan of the requests that they belong to.
    """

    tokens: np.ndarray
    lanes: tuple[Lane, ...]
    sampled: np.ndarray
    rows: list[int]


def step_arrays(
    plan: StepPlan, shapes: StepShapes, width: int, scored: Container[int] = ()
) -> StepArrays:
    """The arrays of a plan.

    Args:
        plan: the plan.
        shapes: sizes to round up to.
        width: entries of a table.
        scored: places of requests whose tokens have been computed by another program; of each the
            last one is computed again, if the next is to be drawn.
    """
    single, parts = [], []  # (place in the plan, start, count)
    sampled = plan.sampled()
    for place, (request, count) in enumerate(zip(plan.requests, plan.counts, strict=True)):
        start, end = request.computed, request.computed + count
        if place in scored:
            single += [(place, end - 1, 1)] * sampled[place]
        elif count == 1:
            single.append((place, start, 1))
        else:
            cuts = range(start, end, shapes.chunk)
            parts += [(place, cut, min(shapes.chunk, end - cut)) for cut in cuts]
    rows = [place for place, wanted in enumerate(sampled) if wanted]
    decodes, chunks = shapes.fit(max(len(single), len(rows)), len(parts))
    lanes, tokens, last = [], [], {}
    for members, size, columns, before in (
        (single, decodes, 1, 0),
        (parts, chunks, shapes.chunk, decodes),
    ):
        if not size:
            continue
        table = np.zeros((size, width), np.int32)
        positions = np.full((size, columns), -1, np.int32)
        new = np.zeros((size, columns), np.int32)
        for row, (place, start, count) in enumerate(members):
            request = plan.requests[place]
            table[row, : len(request.pages)] = request.pages
            positions[row, :count] = np.arange(start, start + count)
            new[row, :count] = request.tokens(start, count)
            last[place] = before + row * columns + count - 1
        lanes.append(Lane(table, positions))
        tokens.append(new.ravel())
    numbers = np.full(decodes, -1, np.int32)
    numbers[: len(rows)] = [last[place] for place in rows]
    return StepArrays(np.concatenate(tokens), tuple(lanes), numbers, rows)


def empty_arrays(rows: int, chunk_rows: int, chunk: int, width: int) -> StepArrays:
    """Arrays of these shapes without a token, to compile what takes them."""
    sizes = [(rows, 1), (chunk_rows, chunk)]
    lanes = tuple(
        Lane(np.zeros((size, width), np.int32), np.full((size, columns), -1, np.int32))
        for size, columns in sizes
        if size
    )
    tokens = np.zeros(rows + chunk_rows * chunk, np.int32)
    return StepArrays(tokens, lanes, np.full(rows, -1, np.int32), [])
