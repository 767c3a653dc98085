"""The lists of tiles that the kernels visit, against the mask itself."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tpu import steps
from tests.pallas_kernels.cases import CASES, call_of

BLOCK_Q, BLOCK_K = 4, 8
LISTED = ("plain", "window_block", "segments", "nothing", "ring")


def blocked(name):
    """Tables, and which scores of each tile are visible, [R, outer, inner, q, k].

    Queries that pad the last block may see anything: their results are dropped.
    """
    (batch, length, keys, *_), options = CASES[name]
    mask = call_of((np.zeros((1, 1)), (), (), None, None), options).mask
    where = steps.places(mask, length, keys, BLOCK_Q, BLOCK_K)
    fields = dataclasses.asdict(where)
    q, k, qs, ks = (
        None if fields[x] is None else np.broadcast_to(fields[x], (batch, fields[x].shape[1]))
        for x in ("q_positions", "k_positions", "q_segments", "k_segments")
    )
    column = lambda x: None if x is None else x[:, :, None]  # noqa: E731
    row = lambda x: None if x is None else x[:, None]  # noqa: E731
    seen = np.asarray(steps.visible(mask, column(q), row(k), column(qs), row(ks)))
    seen = np.broadcast_to(seen, (batch, q.shape[1], k.shape[1])) & (k < steps.FAR)[:, None]
    seen = seen.reshape(batch, -1, BLOCK_Q, seen.shape[2] // BLOCK_K, BLOCK_K).swapaxes(2, 3)
    tables = [
        np.broadcast_to(x, seen.shape[:3]) for x in steps.tables(mask, where, BLOCK_Q, BLOCK_K)
    ]
    return (*tables, seen)


KNOWN = pytest.mark.parametrize("known", [True, False], ids=["known", "traced"])


@KNOWN
def test_parts_of_a_list_are_as_long_and_in_order(known):
    visited = np.random.default_rng(0).random((5, 7)) < 0.5
    parts = np.asarray(steps.shared(jnp.asarray(visited), 2))
    assert (parts.sum(0) == visited).all()
    count = visited.sum()
    assert parts.sum((1, 2)).tolist() == [-(-count // 2), count // 2]
    assert np.flatnonzero(parts[0]).max() < np.flatnonzero(parts[1]).min()
    tables = parts if known else jnp.asarray(parts)
    listed, length, steps_of_each = steps.listed(tables, tables, idle=False)
    assert steps_of_each == -(-count // 2)
    work = np.asarray(listed).reshape(2, length) & steps.WORK != 0
    assert work.sum(1).tolist() == parts.sum((1, 2)).tolist()


@pytest.mark.parametrize("name", [*LISTED, "full", "full_ragged", "chunk", "left_padded"])
def test_no_visible_tile_is_dropped_and_full_tiles_hide_nothing(name):
    visited, full, seen = blocked(name)
    length = CASES[name][0][1]
    last = seen[:, -1, :, : (length - 1) % BLOCK_Q + 1]
    needed = np.concatenate([seen[:, :-1].any((3, 4)), last.any((2, 3))[:, None]], axis=1)
    assert (visited | ~needed).all()
    assert (seen.all((3, 4)) | ~full).all()


@KNOWN
@pytest.mark.parametrize("name", LISTED)
def test_steps_visit_each_tile_once_and_mark_the_ends_of_every_row(name, known):
    visited, full, _ = blocked(name)
    tables = (visited, full) if known else (jnp.asarray(visited), jnp.asarray(full))
    codes, length, count = steps.listed(*tables)
    codes = np.asarray(codes).reshape(len(visited), length)[:, : int(count)]
    for row, table, whole in zip(codes, visited, full, strict=True):
        work = row[row & steps.WORK != 0]
        found = np.zeros_like(table)
        np.add.at(found, (steps.outer_block(work), steps.inner_block(work)), True)
        assert len(work) == table.sum() and (found == table).all()
        masked = (work & steps.MASKED != 0) == ~whole[
            steps.outer_block(work), steps.inner_block(work)
        ]
        assert masked.all()
        shown = table | ~table.any(1, keepdims=True) & (np.arange(table.shape[1]) == 0)
        first, last = shown.argmax(1), table.shape[1] - 1 - shown[:, ::-1].argmax(1)
        for flag, place in ((steps.FIRST, first), (steps.LAST, last)):
            ends = row[row & flag != 0]
            assert (steps.outer_block(ends) == np.arange(table.shape[0])).all()
            assert (steps.inner_block(ends) == place).all()
