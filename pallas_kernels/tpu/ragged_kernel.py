"""Attention of a step that mixes chunks and single tokens over pages: one call, one list of work.

A piece of work is a block of one row's queries: a token that is decoded is one of a single unit of
rows, a chunk of a prompt is as many blocks as it fills. Pages stay in HBM and are copied by hand,
those of the next block of keys, or of the next piece of work, while this one is computed:

    for each piece of a core's work:
        await its queries; start the copy of the next piece's
        for each block of keys between its first and its last:
            start the copies of the block that comes next, of whatever row; await those of this one
            zero what is absent, if anything is
            for each part: s = sum_j (a_j q).K_j^T; online softmax; out_j = decay out_j + p.V_j
        write sum_j b_j out_j / total, and lse

Both sizes of a piece go through one program: sums are those of the larger, of which a decoding row
uses the first unit. Streams are copied one by one from the slots of their pools, so that a layer
reads its own sources and no others.

Pieces are whole: where two cores share the list, a row gives the same whoever else is in the step.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, Ref
from jax.experimental import pallas as pl

from pallas_kernels.tpu import ragged_copies as copies
from pallas_kernels.tpu.blocks import LANES
from pallas_kernels.tpu.how import LOG2E
from pallas_kernels.tpu.ragged_copies import Memory, Piece, Static, by_size, ceil
from pallas_kernels.tpu.tile import HIDDEN, NN, NT, dot, spread


def kernel(static: Static, *refs: Any) -> None:
    memory = Memory(*refs)
    core, step = pl.program_id(0), pl.program_id(1)
    first = memory.bounds[core]
    count = memory.bounds[core + 1] - first
    pl.when(step < count)(lambda: _piece(static, memory, first, step, count))


def _piece(static: Static, memory: Memory, first: Array, index: Array, count: Array) -> None:
    """The piece of work `index` of a core's own `count`, of which `first` is the first."""
    piece = Piece.of(memory.numbers, first + index)
    following = Piece.of(memory.numbers, first + jnp.minimum(index + 1, count - 1))
    small = piece.queries <= static.form.tokens
    sizes = sorted({1, static.form.units})

    @pl.when(index == 0)
    def _() -> None:
        memory.turn[0] = 0
        copies.queries(static, memory, piece, 0, "start")
        copies.keys(static, memory, piece, _block(static, piece), 0, "start")

    @pl.when(index + 1 < count)
    def _() -> None:
        copies.queries(static, memory, following, (index + 1) % 2, "start")

    copies.queries(static, memory, piece, index % 2, "wait")
    by_size(small, sizes, functools.partial(_begin, static, memory))
    # Without a key there is a block too, which is empty: the pipeline has no exceptions.
    low = _block(static, piece)
    last = jnp.maximum(ceil(piece.high, static.tokens), low + 1)

    def visit(block: Array, _: None) -> None:
        slot = memory.turn[0]

        @pl.when(block + 1 < last)
        def _() -> None:
            copies.keys(static, memory, piece, block + 1, 1 - slot, "start")

        @pl.when((block + 1 == last) & (index + 1 < count))
        def _() -> None:
            copies.keys(static, memory, following, _block(static, following), 1 - slot, "start")

        copies.keys(static, memory, piece, block, slot, "wait")
        start = block * static.tokens
        # Memory of absent keys may hold NaN, and 0 * NaN is NaN.
        absent = (start < piece.low) | (start + static.tokens > piece.high)
        pl.when(absent)(functools.partial(copies.clear, static, memory, piece, block, slot))

        def attend(units: int) -> None:
            _attend(static, memory, piece, (index % 2, slot, start), units)

        by_size(small, sizes, attend)
        memory.turn[0] = 1 - slot

    jax.lax.fori_loop(low, last, visit, None)

    @pl.when(index > 0)
    def _() -> None:
        before = Piece.of(memory.numbers, first + jnp.maximum(index - 1, 0))
        copies.results(static, memory, before, "wait")

    by_size(small, sizes, functools.partial(_finish, static, memory))
    copies.results(static, memory, piece, "start")
    pl.when(index + 1 == count)(lambda: copies.results(static, memory, piece, "wait"))


def _block(static: Static, piece: Piece) -> Array:
    """The first block of keys of a piece."""
    return jax.lax.div(piece.low, static.tokens)


def _begin(static: Static, memory: Memory, units: int) -> None:
    rows = pl.ds(0, units * static.form.unit_rows)
    for sums, start in ((memory.top, HIDDEN / 2), (memory.total, 0.0), (memory.acc, 0.0)):
        part = sums.at[..., rows, :]
        part[...] = jnp.full(part.shape, start, part.dtype)


def _attend(
    static: Static, memory: Memory, piece: Piece, where: tuple[Any, Any, Any], units: int
) -> None:
    """A block of keys, whose first position is the last of `where`, for so many units."""
    form, (turn, slot, start) = static.form, where
    rows = pl.ds(0, units * form.unit_rows)
    token = memory.tokens[rows, :1]
    position = piece.position + token
    limit = jnp.where(token < piece.queries, jnp.minimum(position, piece.high - 1), -1)
    key = start + jax.lax.broadcasted_iota(jnp.int32, (1, static.tokens), 1)
    seen = key <= limit
    if static.window is not None:
        seen = seen & (position - key < static.window)

    def part(number: int | Array) -> None:
        _part(static, memory, number, (turn, slot), units, seen)

    # Some parts in straight code, so that products of one overlap the softmax of another.
    straight = next(n for n in (4, 3, 2, 1) if form.parts % n == 0)

    def several(group: int | Array, _: None) -> None:
        for index in range(straight):
            part(group * straight + index)

    if form.parts == straight:
        several(0, None)
    else:
        jax.lax.fori_loop(0, form.parts // straight, several, None)


def _part(
    static: Static,
    memory: Memory,
    number: int | Array,
    where: tuple[Any, Any],
    units: int,
    seen: Array,
) -> None:
    """Scores, online softmax and products with the values of the heads of one part."""
    form, softcap, (turn, slot) = static.form, static.how.softcap, where
    count = units * form.unit_rows
    rows, dtype = pl.ds(0, count), memory.q.dtype

    def stored(buffer: Ref, width: int) -> Array:
        lanes = pl.ds(pl.multiple_of(jnp.int32(number * width), width), width)
        return buffer[slot, ..., lanes].astype(dtype).reshape(static.tokens, width)

    score = 0.0
    for source, buffer in enumerate(memory.buffers[: form.num_keys]):
        query = memory.q[turn, pl.ds(0, units), number, source].reshape(count, form.key_width)
        product = dot(query, stored(buffer, form.key_width), NT)
        if memory.scale_buffers:
            product = product * _scales(static, memory, (number, source, slot), rows)
        score = score + product
    if softcap is not None:
        score = softcap * LOG2E * jnp.tanh(score / softcap)
    score = jnp.where(seen, score, HIDDEN)
    before = memory.top[number, rows]
    above = jnp.maximum(before, score.max(1, keepdims=True))
    weight = jnp.exp2(score - above[:, :1])
    decay = jnp.exp2(before - above)
    memory.top[number, rows] = above
    memory.total[number, rows] = decay * memory.total[number, rows] + weight.sum(1, keepdims=True)
    for source, buffer in enumerate(memory.buffers[form.num_keys :]):
        share = weight
        if memory.scale_buffers:
            share = share * _scales(static, memory, (number, form.num_keys + source, slot), rows)
        grown = dot(share.astype(dtype), stored(buffer, form.value_width), NN)
        acc = memory.acc[number, source, rows]
        memory.acc[number, source, rows] = spread(decay, grown) * acc + grown


def _scales(static: Static, memory: Memory, where: tuple[Any, int, Any], rows: Any) -> Array:
    """Scales of a stream's tokens for one part, [1, tokens], or [M, tokens] for several heads.

    A row of the buffer has those of a few tokens for every head. A product with a matrix of zeros
    and ones puts the numbers of one head where their tokens are among the lanes, whatever the page,
    and of the pages that share a tile of lanes each keeps its own.
    """
    number, stream, slot = where
    stored = memory.scale_buffers[stream][slot, :, 0, :]  # [rows of scales, heads * tokens]
    step = static.scale_tokens
    shape = (stored.shape[0], LANES)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    shift = lane >> (step.bit_length() - 1)
    found = []
    for head in range(static.form.together):
        spread_out = dot(stored, memory.places[number * static.form.together + head], NN)
        parts = [
            jnp.sum(jnp.where(row == first + shift, spread_out, 0.0), axis=0, keepdims=True)
            for first in range(0, shape[0], LANES // step)
        ]
        found.append(jnp.concatenate(parts, axis=1))
    if len(found) == 1:
        return found[0]
    return dot(memory.owners[rows, :], jnp.concatenate(found, axis=0), NN)


def _finish(static: Static, memory: Memory, units: int) -> None:
    """A piece's results, in the block that is copied out."""
    form = static.form
    shape = (units, form.unit_rows)
    rows = pl.ds(0, units * form.unit_rows)

    def part(number: Array, _: None) -> None:
        total = memory.total[number, rows]
        some = total > 0
        sure = jnp.where(some, total, 1.0)
        mixed = memory.acc[number, 0, rows] * memory.weights[0, number]
        for source in range(1, form.num_values):
            mixed += memory.acc[number, source, rows] * memory.weights[source, number]
        out = mixed * spread(1 / sure, mixed)
        block = memory.block.at[pl.ds(0, units), number]
        block[...] = out.reshape(*shape, form.value_width).astype(memory.block.dtype)
        if memory.block_lse is not None:
            lse = jnp.where(some, (memory.top[number, rows] + jnp.log2(sure)) / LOG2E, -jnp.inf)
            memory.block_lse.at[pl.ds(0, units), number][...] = lse.reshape(*shape, LANES)

    jax.lax.fori_loop(0, form.parts, part, None)
