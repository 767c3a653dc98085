"""The kernel of decoding: few queries against a long cache, read once, in place, and never mixed.

The cache stays in HBM and is copied by hand. The blocks that hold something visible, of all rows of
the batch, are one list, and so the copies of a row begin while the row before it is computed:

    for each block of the list:
        start the copies of the block two places on; wait for those of this one
        zero what is absent, if anything is
        s = sum_j (a_j q).K_j^T                       8 bits: each product times its scales
        online softmax; out_j = decay out_j + p.V_j   8 bits: p times its scales
        last block of a row: write out_j / total and lse

Weights fold into the queries and outputs, so a block meets the matrix unit as it was stored.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, Ref
from jax.experimental import pallas as pl

from pallas_kernels.masks import Mask
from pallas_kernels.tpu import steps as steps_lib
from pallas_kernels.tpu.blocks import LANES
from pallas_kernels.tpu.how import How
from pallas_kernels.tpu.tile import HIDDEN, LOG2E, NN, NT, Refs, dot, spread

Method = Literal["start", "wait"]  # of a copy

DEPTH = 3  # blocks in flight, the one at work included


@dataclasses.dataclass(frozen=True)
class Term:
    """One product with a part of the stored block: lanes [start, start + width) of a buffer."""

    buffer: int
    start: int
    width: int


@dataclasses.dataclass(frozen=True)
class CacheReader:
    """What differs between the forms of a cache.

    Attributes:
      heads: products per block, each for its own KV head (1: one product for all).
      rows: rows of a block in one product.
      chunk: rows that are multiplied at once.
      scores, outputs: the parts that are multiplied with queries, and with probabilities.
      buffers: shapes of the VMEM buffers of a block.
      copy: (method, row, block, slot, Memory) starts or awaits the copies of a block.
      read: (buffer, slot, head, chunk start, chunk size, term) to [chunk, width].
      clear: (row, block, slot, reference of positions, Memory) zeroes absent values of a block.
    """

    heads: int
    rows: int
    chunk: int
    scores: tuple[Term, ...]
    outputs: tuple[Term, ...]
    buffers: tuple[tuple[int, ...], ...]
    copy: Callable
    read: Callable
    clear: Callable


@dataclasses.dataclass(frozen=True)
class Memory:
    """References of the kernel: pages or slots, lengths, the cache, buffers and semaphores."""

    table: Any
    ends: Any
    stored: Any
    buffers: Any
    sems: Any


@dataclasses.dataclass(frozen=True)
class Work:
    """A block that has arrived, and what is done with it.

    Attributes:
      refs: queries, and integers of queries and keys, by name.
      buffers: of the cache, of which `slot` holds the block.
      sums: maximum, denominator and outputs so far.
      how, rule, form: static settings.
    """

    refs: Any
    buffers: Any
    slot: Any
    sums: tuple[Any, Any, Any]
    how: How
    rule: Mask
    form: CacheReader


def kernel(
    codes: Ref,
    table: Ref,
    ends: Ref,
    refs: Refs,
    stored: Sequence[Ref],
    out: Ref,
    lse: Ref,
    *scratch: Ref,
    how: How,
    rule: Mask,
    form: CacheReader,
    length: int,
) -> None:
    *buffers, sems, top, total, acc = scratch
    item, count = pl.program_id(1), pl.num_programs(1)
    first = pl.program_id(0) * length
    code = codes[first + item]
    working = code & steps_lib.WORK != 0

    memory = Memory(table, ends, stored, buffers, sems)

    def copies(index: int | Array, method: Method) -> None:
        step = codes[first + index]
        row, block = steps_lib.outer_block(step), steps_lib.inner_block(step)

        @pl.when(step & steps_lib.WORK != 0)
        def _() -> None:
            form.copy(method, row, block, index % DEPTH, memory)

    @pl.when(item == 0)
    def _() -> None:
        for ahead in range(DEPTH - 1):
            pl.when(ahead < count)(functools.partial(copies, ahead, "start"))

    @pl.when(item + DEPTH - 1 < count)
    def _() -> None:
        copies(item + DEPTH - 1, "start")

    @pl.when(code & steps_lib.FIRST != 0)
    def _() -> None:
        top[...] = jnp.full(top.shape, HIDDEN / 2, top.dtype)
        total[...] = jnp.zeros(total.shape, total.dtype)
        acc[...] = jnp.zeros(acc.shape, acc.dtype)

    @pl.when(working)
    def _() -> None:
        copies(item, "wait")
        slot = item % DEPTH
        # Memory of absent keys may hold NaN, and 0 * NaN is NaN.
        positions = refs["k_positions"]
        row, block = steps_lib.outer_block(code), steps_lib.inner_block(code)
        absent = jnp.max(positions[...]) >= steps_lib.FAR
        pl.when(absent)(lambda: form.clear(row, block, slot, positions, memory))

        work = Work(refs, buffers, slot, (top, total, acc), how, rule, form)

        def visit(head: int | Array) -> None:
            for start in range(0, form.rows, form.chunk):
                _visit(work, head, start)

        # Some heads in straight code, so that products of one overlap the softmax of another.
        straight = next(n for n in (4, 3, 2, 1) if form.heads % n == 0)

        def several(group: int | Array, _: None) -> None:
            for index in range(straight):
                visit(group * straight + index)

        if form.heads == straight:
            several(0, None)
        else:
            jax.lax.fori_loop(0, form.heads // straight, several, None)

    @pl.when(code & steps_lib.LAST != 0)
    def _() -> None:
        some = total[...] > 0
        sure = jnp.where(some, total[...], 1.0)
        for index in range(len(form.outputs)):
            out[:, index] = acc[:, index] * _spread3(1 / sure, acc.shape[-1])
        lse[...] = jnp.where(some, (top[...] + jnp.log2(sure)) / LOG2E, -jnp.inf)


def _spread3(column: Array, width: int) -> Array:
    return jnp.tile(column, (1, 1, pl.cdiv(width, LANES)))[:, :, :width]


def _visit(work: Work, head: int | Array, start: int) -> None:
    """One chunk of a block: scores, online softmax, products with the values."""
    refs, buffers, slot = work.refs, work.buffers, work.slot
    top, total, acc = work.sums
    how, rule, form = work.how, work.rule, work.form
    part = pl.ds(start, form.chunk)
    dtype = refs["q"].dtype
    score = 0.0
    for index, term in enumerate(form.scores):
        stored = form.read(buffers[term.buffer], slot, head, start, form.chunk, term)
        product = dot(refs["q"][head, index], stored.astype(dtype), NT)  # [M, chunk]
        if refs["scales"] is not None:
            product = product * _scale(refs, head, index, part)
        score = score + product
    if how.softcap is not None:
        score = how.softcap * LOG2E * jnp.tanh(score / how.softcap)
    column = lambda x: x[:, :1]  # noqa: E731
    q_segments, k_segments = refs["q_segments"], refs["k_segments"]
    seen = steps_lib.visible(
        rule,
        column(refs["q_positions"]),
        refs["k_positions"][:, part],
        None if q_segments is None else column(q_segments),
        None if k_segments is None else k_segments[:, part],
    )
    if refs["k_heads"] is not None:
        seen = seen & (column(refs["q_heads"]) == refs["k_heads"][:, part])
    score = jnp.where(seen, score, HIDDEN)
    before = top[head]
    above = jnp.maximum(before, score.max(1, keepdims=True))
    weight = jnp.exp2(score - above[:, :1])
    decay = jnp.exp2(before - above)
    top[head] = above
    total[head] = decay * total[head] + weight.sum(1, keepdims=True)
    for index, term in enumerate(form.outputs):
        stored = form.read(buffers[term.buffer], slot, head, start, form.chunk, term)
        share = weight
        if refs["scales"] is not None:
            share = weight * _scale(refs, head, len(form.scores) + index, part)
        grown = dot(share.astype(dtype), stored.astype(dtype), NN)
        acc[head, index] = spread(decay, grown) * acc[head, index] + grown


def _scale(refs: Refs, head: int | Array, term: int, part: slice | pl.Slice) -> Array:
    """Scales of a chunk, [1, chunk], or [M, chunk] where rows belong to different heads."""
    if refs["own"] is None:
        return refs["scales"][head, pl.ds(term, 1), part]
    return dot(refs["own"][...], refs["scales"][term, :, part], NN)
