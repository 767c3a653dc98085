"""The tile kernel, forward: keys and values are mixed in VMEM, once per tile that is visited.

The grid is (batch, KV head, step). A step is a tile of keys that a block of queries sees something
of; `steps.listed` has written them down, block by block, so no program runs to find nothing to do.

    first step of a query block:   top, total, acc = HIDDEN / 2, 0, 0
    every step, for parts of the tile (`compute` or `full` keys; they bound the score tile):
        key, value = sum_j a_j K_j, sum_j b_j V_j     float32, rounded once; absent values are 0
        s = q.key^T                                   the queries carry scale log2(e)
        above = max(top, max s); p = 2^(s - above); decay = 2^(top - above)
        total, acc = decay total + sum p, decay acc + p.value
    last step of a query block:    out = acc / total, lse = ln 2 (top + log2 total)

The G query heads of a KV head are stacked into the rows of a block: they share the mixed tile.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.masks import Mask
from pallas_kernels.sources import MixedSources
from pallas_kernels.tpu import steps as steps_lib
from pallas_kernels.tpu.blocks import LANES, Blocks
from pallas_kernels.tpu.how import LOG2E, How
from pallas_kernels.tpu.steps import Step, Table

DotDimensions = tuple[tuple[tuple[int], tuple[int]], tuple[tuple[()], tuple[()]]]
IndexMap = Callable[..., tuple[Step | int, ...]]
Refs = Mapping[str, Any]  # by name: a reference, a tuple of them for keys and values, or None

HIDDEN = -0.7 * 3.4028235e38  # score of a masked key; half of it is the first maximum
NT, NN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))


def dot(x: Array, y: Array, dims: DotDimensions) -> Array:
    """Product with fp32 sums; full precision for fp32 operands only."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, dims, precision=exact, preferred_element_type=jnp.float32)


def mix(
    sources: Sequence[Ref],
    weights: Ref | None,
    rows: slice | pl.Slice,
    dtype: DTypeLike,
    present: steps_lib.Table | None,
) -> Array:
    """Rows of the weighted sum of the sources, in fp32, rounded once; absent rows are zero."""
    if weights is None:
        mixed = sources[0][rows, :].astype(dtype)
    else:
        terms = [x[rows, :].astype(jnp.float32) * weights[j, :] for j, x in enumerate(sources)]
        mixed = functools.reduce(jnp.add, terms).astype(dtype)
    # Zeroed after rounding: a select is as dear there as before it.
    return mixed if present is None else jnp.where(present, mixed, jnp.zeros_like(mixed))


def present_rows(
    column: Ref | None, offset: int, size: int, edge: tuple[int, Step] | None
) -> steps_lib.Table | None:
    """Which of `size` keys from `offset` of the block are there, [size, 1] bool, or None."""
    if column is not None:
        return column[pl.ds(offset, size), :1] < steps_lib.FAR
    if edge is None:
        return None
    num_keys, start = edge
    return start + offset + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0) < num_keys


def step_code(codes: Ref, length: int, per_row: bool) -> Array:
    """The packed step of this grid point, and of the index maps."""
    return codes[(pl.program_id(0) * length if per_row else 0) + pl.program_id(2)]


def _forward_kernel(
    codes: Ref,
    refs: Refs,
    out: Ref,
    lse: Ref,
    top: Ref,
    total: Ref,
    acc: Ref,
    *,
    how: How,
    mask: Mask,
    blocks: Blocks,
    length: int,
    tail: int | None,
) -> None:
    step = step_code(codes, length, how.per_row)

    @pl.when(step & steps_lib.FIRST != 0)
    def _() -> None:
        top[...] = jnp.full(top.shape, HIDDEN / 2, top.dtype)
        total[...] = jnp.zeros(total.shape, total.dtype)
        acc[...] = jnp.zeros(acc.shape, acc.dtype)

    def visit(masked: bool) -> None:
        start = steps_lib.inner_block(step) * blocks.keys
        query = refs["q"][...]
        rows, dtype = query.shape[0], query.dtype
        size = blocks.compute if masked else blocks.full
        for offset in range(0, blocks.keys, size):
            part = pl.ds(offset, size)
            present = None
            if masked:
                edge = None if tail is None else (tail, start)
                present = present_rows(refs["k_column"], offset, size, edge)
            key = mix(refs["keys"], refs["key_weights"], part, dtype, None)
            value = mix(refs["values"], refs["value_weights"], part, dtype, present)
            score = dot(query, key, NT)  # [rows, size]
            if how.softcap is not None:
                score = how.softcap * LOG2E * jnp.tanh(score / how.softcap)
            if masked:
                score = jnp.where(_seen(refs, mask, part, rows), score, HIDDEN)
            before = top[...]
            above = jnp.maximum(before, score.max(1, keepdims=True))
            weight = jnp.exp2(score - jnp.tile(above, (1, size // LANES)))
            decay = jnp.exp2(before - above)
            top[...] = above
            total[...] = decay * total[...] + weight.sum(1, keepdims=True)
            acc[...] = spread(decay, acc) * acc[...] + dot(weight.astype(dtype), value, NN)

    working, masked = step & steps_lib.WORK != 0, step & steps_lib.MASKED != 0
    if how.full:
        pl.when(working & ~masked)(functools.partial(visit, False))
    if how.partial:
        pl.when(working & masked)(functools.partial(visit, True))

    @pl.when(step & steps_lib.LAST != 0)
    def _() -> None:
        some = total[...] > 0
        sure = jnp.where(some, total[...], 1.0)
        out[...] = (acc[...] * spread(1 / sure, acc)).astype(out.dtype)
        logs = jnp.where(some, (top[...] + jnp.log2(sure)) / LOG2E, -jnp.inf)
        lse[...] = logs.T[:1, :]


def spread(column: Array, like: Array | Ref) -> Array:
    """A lane-broadcast [rows, 128] to the width of `like`."""
    width = like.shape[-1]
    return jnp.tile(column, (1, pl.cdiv(width, LANES)))[:, :width]


def _seen(refs: Refs, mask: Mask, part: slice | pl.Slice, rows: int) -> steps_lib.Table:
    """Visibility of a tile [rows, compute]; the integers of a token serve its G rows."""
    k_positions = refs["k_positions"][:, part]
    repeat = (rows // refs["q_positions"].shape[0], k_positions.shape[1] // LANES)
    q_segments, k_segments = refs["q_segments"], refs["k_segments"]
    return steps_lib.visible(
        mask,
        jnp.tile(refs["q_positions"][...], repeat),
        k_positions,
        None if q_segments is None else jnp.tile(q_segments[...], repeat),
        None if k_segments is None else k_segments[:, part],
    )


def forward(
    how: How,
    mask: Mask,
    blocks: Blocks,
    q: Array,
    sources: MixedSources,
    where: steps_lib.BlockedPlaces,
) -> tuple[Array, Array]:
    """Attention of stacked queries.

    Args:
      q: [B, K, query blocks, G * queries, H], times scale (and log2(e) without a soft cap).
      sources: keys and values [B, K, S, H], and weights [K, J, H] fp32 or None, of each.
      where: `steps.BlockedPlaces` for these blocks.

    Returns:
      Output like q, and lse [B, K, query blocks, 1, G * queries] fp32.
    """
    keys, values, key_weights, value_weights = sources
    batch, heads, _, rows, size = q.shape
    num_keys, value_size = keys[0].shape[2], values[0].shape[3]
    visited, full = steps_lib.tables(mask, where, blocks.queries, blocks.keys)
    codes, length, count = steps_lib.listed(visited, full)
    how = how.specialized(visited, full)
    at = functools.partial(index_map, per_row=how.per_row, length=length)
    token, key = at(steps_lib.outer_block), at(steps_lib.inner_block)
    shared = lambda x: x.shape[0] == 1  # noqa: E731
    lanes = lambda x: broadcast_lanes(x)  # noqa: E731
    inputs, specs = {}, {}

    def give(name: str, array: Array | None, spec: pl.BlockSpec) -> None:
        inputs[name], specs[name] = array, None if array is None else spec

    give("q", q, pl.BlockSpec((None, None, None, rows, size), token("bhi00")))
    for name, side, weights in (
        ("key", keys, key_weights),
        ("value", values, value_weights),
    ):
        width = side[0].shape[3]
        block = pl.BlockSpec((None, None, blocks.keys, width), key("bhi0"))
        inputs[name + "s"], specs[name + "s"] = side, (block,) * len(side)
        give(name + "_weights", weights, pl.BlockSpec((None, len(side), width), token("h00")))
    for name, x in (("q_positions", where.q_positions), ("q_segments", where.q_segments)):
        one = x is not None and shared(x)
        spec = pl.BlockSpec((None, blocks.queries, LANES), token("0i0" if one else "bi0"))
        give(name, None if x is None else lanes(x), spec)
    for name, x in (("k_positions", where.k_positions), ("k_segments", where.k_segments)):
        one = x is not None and shared(x)
        spec = pl.BlockSpec((None, 1, blocks.keys), key("00i" if one else "b0i"))
        give(name, None if x is None else jnp.asarray(x)[:, None], spec)
    column = lanes(where.k_positions) if where.holes else None
    one = "0i0" if shared(where.k_positions) else "bi0"
    give("k_column", column, pl.BlockSpec((None, blocks.keys, LANES), key(one)))

    kernel = functools.partial(
        _forward_kernel, how=how, mask=mask, blocks=blocks, length=length,
        tail=num_keys if num_keys % blocks.keys else None,
    )  # fmt: skip
    out_shape = (*q.shape[:4], value_size)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, count),
            in_specs=[specs],
            out_specs=[
                pl.BlockSpec((None, None, None, rows, value_size), token("bhi00")),
                pl.BlockSpec((None, None, None, 1, rows), token("bhi00")),
            ],
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, value_size), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(out_shape, q.dtype),
            jax.ShapeDtypeStruct((*q.shape[:3], 1, rows), jnp.float32),
        ],
        compiler_params=compiler_params(how),
        interpret=how.interpret,
        name="tile_forward",
    )(codes, inputs)


def compiler_params(how: How) -> pltpu.CompilerParams:
    """Batch rows and heads are independent; three quarters of the vector memory are ours."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=how.chip.vmem * 3 // 4,
    )


def broadcast_lanes(x: Table) -> Array:
    """Integers [R, T] as [R, T, 128]."""
    return jnp.broadcast_to(jnp.asarray(x)[:, :, None], (*x.shape, LANES))


def index_map(
    block_of: Callable[[Step], Step], per_row: bool, length: int
) -> Callable[[str], IndexMap]:
    """Makes index maps from their letters: b batch, h KV head, i the step's block, 0."""

    def make(letters: str) -> IndexMap:
        def indices(b: Array, h: Array, s: Array, codes: Ref) -> tuple[Step | int, ...]:
            block = block_of(codes[(b * length if per_row else 0) + s])
            return tuple({"b": b, "h": h, "i": block, "0": 0}[x] for x in letters)

        return indices

    return make
