"""The tile kernel, backward: one fused kernel, keys outside, queries inside.

    first step of a key tile:      key, value = the mix, kept in VMEM; dkey, dvalue = 0
    every step, a block of queries that sees the tile, for parts of the tile:
        s = key.q^T                                   transposed: [keys, rows]
        p = 2^(s - lse)
        dvalue += p.dout
        ds = p (value.dout^T - delta)
        dkey += ds.q;  dq[block] += ds^T.key
    last step of all:              dq times scale, rounded

A key tile is mixed once, when its first query block comes; its gradients stay in VMEM until the
last. Scores are transposed, so that the statistics of a row are a row of lanes. The gradient of
the queries of a (batch row, KV head) stays in VMEM as fp32 too; where it would not fit, queries
are taken in several calls.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.masks import Mask
from pallas_kernels.sources import MixedSources
from pallas_kernels.tpu import steps as steps_lib
from pallas_kernels.tpu.blocks import LANES, Blocks
from pallas_kernels.tpu.how import How
from pallas_kernels.tpu.steps import Table
from pallas_kernels.tpu.tile import (
    HIDDEN,
    LOG2E,
    NN,
    NT,
    Refs,
    broadcast_lanes,
    compiler_params,
    dot,
    index_map,
    mix,
    present_rows,
    step_code,
)

BLIND = 1e30  # log-sum-exp of rows that see nothing: exp2(anything - BLIND) = 0
TN = (((0,), (0,)), ((), ()))


def _kernel(
    codes: Ref,
    refs: Refs,
    dq: Ref,
    dkey: Ref,
    dvalue: Ref,
    key: Ref,
    value: Ref,
    dq_acc: Ref,
    *,
    how: How,
    mask: Mask,
    blocks: Blocks,
    length: int,
    tail: int | None,
) -> None:
    step = step_code(codes, length, how.per_row)
    block = steps_lib.inner_block(step)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        _each(dq_acc, lambda i: dq_acc.__setitem__(i, jnp.zeros(dq_acc.shape[1:], jnp.float32)))

    @pl.when(step & steps_lib.FIRST != 0)
    def _() -> None:
        dkey[...] = jnp.zeros(dkey.shape, dkey.dtype)
        dvalue[...] = jnp.zeros(dvalue.shape, dvalue.dtype)
        start = steps_lib.outer_block(step) * blocks.keys
        for offset in range(0, blocks.keys, blocks.compute):
            part = pl.ds(offset, blocks.compute)
            edge = None if tail is None else (tail, start)
            column = refs["k_column"] if how.holes else None
            present = present_rows(column, offset, blocks.compute, edge)
            for name, mixed in (("key", key), ("value", value)):
                side, weights = refs[name + "s"], refs[name + "_weights"]
                mixed[part, :] = mix(side, weights, part, mixed.dtype, present)

    def visit(masked: bool) -> None:
        query, dout, lse, delta = (refs[x][...] for x in ("q", "dout", "lse", "delta"))
        for offset in range(0, blocks.keys, blocks.compute):
            part = pl.ds(offset, blocks.compute)
            score = dot(key[part, :], query, NT)  # [compute, rows]
            slope = None
            if how.softcap is not None:
                capped = jnp.tanh(score / how.softcap)
                slope, score = 1 - capped * capped, how.softcap * LOG2E * capped
            if masked:
                score = jnp.where(_seen(refs, mask, part), score, HIDDEN)
            # Normalized at once: the forward pass has left the log of the denominator, so the
            # softmax is one exponential, and no row has to be seen whole.
            weight = jnp.exp2(score - lse)
            dvalue[part, :] += dot(weight.astype(dout.dtype), dout, NN)
            dweight = dot(value[part, :], dout, NT)
            # The softmax's Jacobian, p * (dp - sum p dp): the sum is sum(out * dout), known before
            # any tile. `delta` has the lse's cotangent taken off: d lse / d score is p as well.
            dscore = weight * (dweight - delta)
            if slope is not None:
                dscore = dscore * slope
            dscore = dscore.astype(query.dtype)
            dkey[part, :] += dot(dscore, query, NN)
            # Every key tile adds to it, so it has to stay where it is: in HBM this would be a read
            # and a write of all queries' gradients for each key tile.
            dq_acc[block] += dot(dscore, key[part, :], TN)

    working, masked = step & steps_lib.WORK != 0, step & steps_lib.MASKED != 0
    if how.full:
        pl.when(working & ~masked)(functools.partial(visit, False))
    if how.partial:
        pl.when(working & masked)(functools.partial(visit, True))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        _each(dq, lambda i: dq.__setitem__(i, (dq_acc[i] * how.scale).astype(dq.dtype)))


def _each(ref: Ref, write: Callable[[Array], None]) -> None:
    """Runs `write` for every query block; a loop, as straight code would be long."""
    jax.lax.fori_loop(0, ref.shape[0], lambda i, _: write(i), None)


def _seen(refs: Refs, mask: Mask, part: slice | pl.Slice) -> steps_lib.Table:
    """Visibility of a transposed tile [compute, rows]."""
    q_segments, k_segments = refs["q_segments"], refs["k_segments"]
    return steps_lib.visible(
        mask,
        refs["q_positions"][...],
        refs["k_column"][part, :1],
        None if q_segments is None else q_segments[...],
        None if k_segments is None else k_segments[part, :1],
    )


def _call(
    how: How,
    mask: Mask,
    blocks: Blocks,
    arrays: Mapping[str, Array],
    sources: MixedSources,
    where: steps_lib.BlockedPlaces,
) -> tuple[Array, Array, Array]:
    """One call of the kernel for the queries that are given."""
    keys, values, key_weights, value_weights = sources
    q = arrays["q"]
    batch, heads, count_q, rows, size = q.shape
    num_keys, value_size = keys[0].shape[2], values[0].shape[3]
    visited, full = steps_lib.tables(mask, where, blocks.queries, blocks.keys)
    codes, length, count = steps_lib.listed(visited.swapaxes(1, 2), full.swapaxes(1, 2))
    how = how.specialized(visited, full, where.holes)
    at = functools.partial(index_map, per_row=how.per_row, length=length)
    token, key = at(steps_lib.inner_block), at(steps_lib.outer_block)
    inputs, specs = {}, {}

    def give(name: str, array: Array | None, spec: pl.BlockSpec) -> None:
        inputs[name], specs[name] = array, None if array is None else spec

    def rows_of(
        x: Table,
    ) -> Array:  # [R, T] integers as rows of the stacked heads, [R, blocks, 1, G * queries]
        x = jnp.asarray(x).reshape(x.shape[0], count_q, 1, blocks.queries)
        return jnp.tile(x, rows // blocks.queries)

    for name, width in (("q", size), ("dout", value_size)):
        give(name, arrays[name], pl.BlockSpec((None, None, None, rows, width), token("bhi00")))
    for name in ("lse", "delta"):
        give(name, arrays[name], pl.BlockSpec((None, None, None, 1, rows), token("bhi00")))
    for name, side, weights in (
        ("key", keys, key_weights),
        ("value", values, value_weights),
    ):
        width = side[0].shape[3]
        block = pl.BlockSpec((None, None, blocks.keys, width), key("bhi0"))
        inputs[name + "s"], specs[name + "s"] = side, (block,) * len(side)
        give(name + "_weights", weights, pl.BlockSpec((None, len(side), width), token("h00")))
    for name, x in (("q_positions", where.q_positions), ("q_segments", where.q_segments)):
        one = x is not None and x.shape[0] == 1
        spec = pl.BlockSpec((None, None, 1, rows), token("0i00" if one else "bi00"))
        give(name, None if x is None else rows_of(x), spec)
    for name, x in (("k_column", where.k_positions), ("k_segments", where.k_segments)):
        one = x is not None and x.shape[0] == 1
        spec = pl.BlockSpec((None, blocks.keys, LANES), key("0i0" if one else "bi0"))
        give(name, None if x is None else broadcast_lanes(x), spec)

    whole = pl.BlockSpec((None, None, count_q, rows, size), lambda b, h, s, codes: (b, h, 0, 0, 0))
    kernel = functools.partial(
        _kernel, how=how, mask=mask, blocks=blocks, length=length,
        tail=num_keys if num_keys % blocks.keys else None,
    )  # fmt: skip
    wide = lambda width: jax.ShapeDtypeStruct((batch, heads, num_keys, width), jnp.float32)  # noqa: E731
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, count),
            in_specs=[specs],
            out_specs=[
                whole,
                pl.BlockSpec((None, None, blocks.keys, size), key("bhi0")),
                pl.BlockSpec((None, None, blocks.keys, value_size), key("bhi0")),
            ],
            scratch_shapes=[
                pltpu.VMEM((blocks.keys, size), q.dtype),
                pltpu.VMEM((blocks.keys, value_size), q.dtype),
                pltpu.VMEM((count_q, rows, size), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), wide(size), wide(value_size)],
        compiler_params=compiler_params(how),
        interpret=how.interpret,
        name="tile_backward",
    )(codes, inputs)


def backward(
    how: How,
    mask: Mask,
    blocks: Blocks,
    arrays: Mapping[str, Array],
    sources: MixedSources,
    where: steps_lib.BlockedPlaces,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients from stacked queries, cotangents and statistics.

    Args:
      arrays: "q" as in `tile.forward`; "dout" like the output; "lse" (in base 2, BLIND for rows
        that see nothing) and "delta", fp32 [B, K, query blocks, 1, G * queries].
      sources, where: as in `tile.forward`.

    Returns:
      dq like q, and dkey [B, K, S, H], dvalue [B, K, S, H'] of the mixed keys and values in fp32,
      dkey for queries as they were given.
    """
    q = arrays["q"]
    count, rows, size = q.shape[2:]
    held = rows * size * (4 + 2 * q.dtype.itemsize)
    chunk = max(1, how.chip.vmem // 4 // held)
    dqs, dkeys, dvalues = [], [], []
    for start in range(0, count, chunk):
        part = {name: x[:, :, start : start + chunk] for name, x in arrays.items()}
        cut = slice(start * blocks.queries, (start + chunk) * blocks.queries)
        dq, dk, dv = _call(how, mask, blocks, part, sources, steps_lib.queries(where, cut))
        dqs.append(dq)
        dkeys.append(dk)
        dvalues.append(dv)
    dkey, dvalue = functools.reduce(jnp.add, dkeys), functools.reduce(jnp.add, dvalues)
    return jnp.concatenate(dqs, axis=2), dkey, dvalue
