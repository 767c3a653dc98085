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
        sampled: int32 numbers of the tokens whose logits are wanted, padded with -1: for each
            request one and those that are drafted, [R, T].
        rows: places in the plan of the requests that they belong to.
    """

    tokens: np.ndarray
    lanes: tuple[Lane, ...]
    sampled: np.ndarray
    rows: list[int]


def step_arrays(
    plan: StepPlan,
    shapes: StepShapes,
    width: int,
    scored: Container[int] = (),
    columns: int = 1,
) -> StepArrays:
    """The arrays of a plan.

    Args:
        plan: the plan.
        shapes: sizes to round up to.
        width: entries of a table.
        scored: places of requests whose tokens have been computed by another program; of each the
            last one is computed again, if the next is to be drawn.
        columns: tokens of a row of the first lane: T, one and as many as are drafted at most.
    """
    single, parts = [], []  # (place in the plan, start, count)
    sampled = plan.sampled()
    for place, (request, count) in enumerate(zip(plan.requests, plan.counts, strict=True)):
        start, end = request.computed, request.computed + count
        if place in scored:
            single += [(place, end - 1, 1)] * sampled[place]
        elif count == 1 or plan.drafts:
            single.append((place, start, count))
        else:
            cuts = range(start, end, shapes.chunk)
            parts += [(place, cut, min(shapes.chunk, end - cut)) for cut in cuts]
    rows = [place for place, wanted in enumerate(sampled) if wanted]
    decodes, chunks = shapes.fit(max(len(single), len(rows)), len(parts))
    lanes, tokens, last = [], [], {}
    for members, size, wide, before in (
        (single, decodes, columns, 0),
        (parts, chunks, shapes.chunk, decodes * columns),
    ):
        if not size:
            continue
        table = np.zeros((size, width), np.int32)
        positions = np.full((size, wide), -1, np.int32)
        new = np.zeros((size, wide), np.int32)
        for row, (place, start, count) in enumerate(members):
            request = plan.requests[place]
            table[row, : len(request.pages)] = request.pages
            positions[row, :count] = np.arange(start, start + count)
            own = request.tokens(start, count)
            new[row, : len(own)] = own
            if plan.drafts:
                new[row, len(own) : count] = plan.drafts[place]
            last[place] = before + row * wide + count - 1
        lanes.append(Lane(table, positions))
        tokens.append(new.ravel())
    numbers = np.full((decodes, columns), -1, np.int32)
    for row, place in enumerate(rows):
        count = 1 + len(plan.drafts[place]) if plan.drafts else 1
        numbers[row, :count] = range(last[place] + 1 - count, last[place] + 1)
    return StepArrays(np.concatenate(tokens), tuple(lanes), numbers, rows)


def empty_arrays(
    rows: int, chunk_rows: int, chunk: int, width: int, columns: int = 1
) -> StepArrays:
    """Arrays of these shapes without a token, to compile what takes them."""
    sizes = [(rows, columns), (chunk_rows, chunk)]
    lanes = tuple(
        Lane(np.zeros((size, width), np.int32), np.full((size, wide), -1, np.int32))
        for size, wide in sizes
        if size
    )
    tokens = np.zeros(rows * columns + chunk_rows * chunk, np.int32)
    return StepArrays(tokens, lanes, np.full((rows, columns), -1, np.int32), [])
