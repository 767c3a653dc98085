"""Decoding: few queries against a long cache, which is read once, in place, and never mixed.

The cache stays in HBM and is copied by hand. The blocks that hold something visible, of all rows of
the batch, are one list, and so the copies of a row begin while the row before it is computed:

    for each block of the list:
        start the copies of the block two places on; wait for those of this one
        zero what is absent, if anything is
        s = sum_j (a_j q).K_j^T                       8 bits: each product times its scales
        online softmax; out_j = decay out_j + p.V_j   8 bits: p times its scales
        last block of a row: write out_j / total and lse

Weights fold into the queries and outputs, so a block meets the matrix unit as it was stored. The
three forms:

    stacked     [P, B, S, K * H], the cache itself and a slot of each source: one product for all
                KV heads with queries that are zero off their own.
    contiguous  [S * K, H] of each source, as it lies in memory: one product for all KV heads,
                in which a query sees the rows of its own head only. FLOPs are K-fold, which a
                step that waits for memory does not feel; nothing is transposed.
    paged       [K, page_size, record] pages: one product for each KV head.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.masks import Mask
from pallas_kernels.tpu import steps as steps_lib
from pallas_kernels.tpu.blocks import LANES
from pallas_kernels.tpu.how import How
from pallas_kernels.tpu.tile import HIDDEN, LOG2E, NN, NT, Refs, dot, spread

Method = Literal["start", "wait"]  # of a copy

_DEPTH = 3  # blocks in flight, the one at work included


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
class Cache:
    """What is decoded from.

    Attributes:
      stored: arrays of the cache, left in HBM.
      visited: bool [B, blocks], the blocks that hold something visible.
      table: int32 page table, flat, or the slot of each array; None where there are neither.
      ends: [B] int32, tokens of each row, of pages; else None.
    """

    stored: Sequence[Array]
    visited: Array
    table: Array | None = None
    ends: Array | None = None


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


def _kernel(
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
) -> None:
    *buffers, sems, top, total, acc = scratch
    item, count = pl.program_id(0), pl.num_programs(0)
    code = codes[item]
    working = code & steps_lib.WORK != 0

    memory = Memory(table, ends, stored, buffers, sems)

    def copies(index: int | Array, method: Method) -> None:
        step = codes[index]
        row, block = steps_lib.outer_block(step), steps_lib.inner_block(step)

        @pl.when(step & steps_lib.WORK != 0)
        def _() -> None:
            form.copy(method, row, block, index % _DEPTH, memory)

    @pl.when(item == 0)
    def _() -> None:
        for ahead in range(_DEPTH - 1):
            pl.when(ahead < count)(functools.partial(copies, ahead, "start"))

    @pl.when(item + _DEPTH - 1 < count)
    def _() -> None:
        copies(item + _DEPTH - 1, "start")

    @pl.when(code & steps_lib.FIRST != 0)
    def _() -> None:
        top[...] = jnp.full(top.shape, HIDDEN / 2, top.dtype)
        total[...] = jnp.zeros(total.shape, total.dtype)
        acc[...] = jnp.zeros(acc.shape, acc.dtype)

    @pl.when(working)
    def _() -> None:
        copies(item, "wait")
        slot = item % _DEPTH
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


def run(
    how: How,
    rule: Mask,
    form: CacheReader,
    q: Array,
    cache: Cache,
    arrays: Mapping[str, Array | np.ndarray | None],
) -> tuple[Array, Array]:
    """The kernel.

    Args:
      rule: `Mask` whose `causal` and `window` hold.
      form: the form of the cache.
      q: [B, heads, terms, M, width] queries of every score term, times scale.
      cache: what is read.
      arrays: "q_positions", "q_heads", "q_segments" [B or 1, M], "k_positions", "k_heads",
        "k_segments" [B or 1, 1, S'], "scales" [B, heads, terms, S']; with "own" [M, K], 1 where a
        row belongs to a KV head, scales are [B, terms, K, S']. What is missing is not looked at.

    Returns:
      out [B, heads, output terms, M, width] and lse [B, heads, M] fp32.
    """
    batch, heads, _, rows, _ = q.shape
    stored, none = list(cache.stored), jnp.zeros(1, jnp.int32)
    table = none if cache.table is None else cache.table
    ends = none if cache.ends is None else cache.ends
    codes, _, count = steps_lib.listed(cache.visited[None], cache.visited[None])
    row = lambda i, codes, *_: steps_lib.outer_block(codes[i])  # noqa: E731
    block = lambda i, codes, *_: steps_lib.inner_block(codes[i])  # noqa: E731

    def spec(shape: tuple[int | None, ...], x: Array | np.ndarray, *letters: str) -> pl.BlockSpec:
        maps = {"b": row, "i": block, "0": lambda *_: 0}
        chosen = ["0" if x.shape[0] == 1 and n == 0 else y for n, y in enumerate(letters)]
        return pl.BlockSpec(shape, lambda *args: tuple(maps[y](*args) for y in chosen))

    inputs: dict[str, Any] = {"q": q}
    specs: dict[str, Any] = {"q": spec((None, *q.shape[1:]), q, *"b0000")}
    for name in ("q_positions", "q_heads", "q_segments"):
        x = arrays.get(name)
        inputs[name] = None if x is None else jnp.broadcast_to(x[:, :, None], (*x.shape, LANES))
        specs[name] = None if x is None else spec((None, rows, LANES), x, *"b00")
    for name in ("k_positions", "k_heads", "k_segments"):
        x = inputs[name] = arrays.get(name)
        last = "0" if name == "k_heads" else "i"  # the heads of every block are the same
        specs[name] = None if x is None else spec((None, 1, form.rows), x, "b", "0", last)
    x = inputs["scales"] = arrays.get("scales")
    specs["scales"] = None if x is None else spec((None, *x.shape[1:3], form.rows), x, *"b00i")

    inputs["own"] = arrays.get("own") if x is not None else None
    own = inputs["own"]
    specs["own"] = None if own is None else pl.BlockSpec(own.shape, lambda *_: (0, 0))

    width = form.outputs[0].width
    wide = (batch, heads, len(form.outputs), rows, width)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, how=how, rule=rule, form=form),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(count,),
            in_specs=[specs, [pl.BlockSpec(memory_space=pl.ANY)] * len(stored)],
            out_specs=[
                pl.BlockSpec((None, *wide[1:]), lambda *args: (row(*args), 0, 0, 0, 0)),
                pl.BlockSpec((None, heads, rows, LANES), lambda *args: (row(*args), 0, 0, 0)),
            ],
            scratch_shapes=[
                *(
                    pltpu.VMEM((_DEPTH, *shape), x.dtype)
                    for shape, x in zip(form.buffers, stored, strict=True)
                ),
                pltpu.SemaphoreType.DMA((_DEPTH,)),
                pltpu.VMEM((heads, rows, LANES), jnp.float32),
                pltpu.VMEM((heads, rows, LANES), jnp.float32),
                pltpu.VMEM(wide[1:], jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(wide, jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, rows, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=how.chip.vmem * 3 // 4,
            disable_bounds_checks=True,
        ),
        interpret=how.interpret,
        name="decode",
    )(codes, table, ends, inputs, stored)
    return out, lse[..., 0]
