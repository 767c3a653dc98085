"""The call of the decoding kernel: its list of blocks, operands and memory; see `decode_kernel`.

A device of two cores (v5p) cuts the list into halves where the cache is in 8 bits, and what the two
find of the row that lies on the cut is combined. The three forms of a cache:

    stacked     [P, B, S, K * H], the cache itself and a slot of each source: one product for all
                KV heads with queries that are zero off their own.
    contiguous  [S * K, H] of each source, as it lies in memory: one product for all KV heads,
                in which a query sees the rows of its own head only. FLOPs are K-fold, which a
                step that waits for memory does not feel; nothing is transposed.
    paged       [K, page_size, record] pages: one product for each KV head.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.combining import combine
from pallas_kernels.masks import Mask
from pallas_kernels.tpu import decode_kernel
from pallas_kernels.tpu import steps as steps_lib
from pallas_kernels.tpu.blocks import LANES
from pallas_kernels.tpu.decode_kernel import DEPTH, CacheReader
from pallas_kernels.tpu.how import How


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

    Raises:
      NotImplementedError: table and list do not fit into scalar memory.
    """
    batch, heads, _, rows, _ = q.shape
    stored, none = list(cache.stored), jnp.zeros(1, jnp.int32)
    table = none if cache.table is None else cache.table
    ends = none if cache.ends is None else cache.ends
    # Copying is the longer part of a step, unless 8 bits become 16: then cores share the steps.
    cores = how.chip.cores if any(x.dtype.itemsize == 1 for x in stored) else 1
    parts = steps_lib.shared(cache.visited, cores) if cores > 1 else cache.visited[None]
    codes, length, count = steps_lib.listed(parts, parts, idle=cores == 1)
    numbers = codes.size + table.size + ends.size
    if 4 * numbers > steps_lib.SMEM:
        raise NotImplementedError(
            f"a page table of {table.size} entries and {codes.size} blocks do not fit into scalar "
            f"memory; use larger pages"
        )
    row = lambda c, i, codes, *_: steps_lib.outer_block(codes[c * length + i])  # noqa: E731
    block = lambda c, i, codes, *_: steps_lib.inner_block(codes[c * length + i])  # noqa: E731

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
        functools.partial(decode_kernel.kernel, how=how, rule=rule, form=form, length=length),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, count),
            in_specs=[specs, [pl.BlockSpec(memory_space=pl.ANY)] * len(stored)],
            out_specs=[
                pl.BlockSpec(
                    (None, None, *wide[1:]), lambda c, *args: (c, row(c, *args), 0, 0, 0, 0)
                ),
                pl.BlockSpec(
                    (None, None, heads, rows, LANES), lambda c, *args: (c, row(c, *args), 0, 0, 0)
                ),
            ],
            scratch_shapes=[
                *(
                    pltpu.VMEM((DEPTH, *shape), x.dtype)
                    for shape, x in zip(form.buffers, stored, strict=True)
                ),
                pltpu.SemaphoreType.DMA((DEPTH,)),
                pltpu.VMEM((heads, rows, LANES), jnp.float32),
                pltpu.VMEM((heads, rows, LANES), jnp.float32),
                pltpu.VMEM(wide[1:], jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((cores, *wide), jnp.float32),
            jax.ShapeDtypeStruct((cores, batch, heads, rows, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=how.chip.vmem * 3 // 4,
            disable_bounds_checks=True,
        ),
        interpret=how.interpret,
        name="decode",
    )(codes, table, ends, inputs, stored)
    if cores == 1:
        return out[0], lse[0, ..., 0]
    return _merged(out, lse[..., 0], parts.any(2))


def _merged(out: Array, lse: Array, written: Array) -> tuple[Array, Array]:
    """What the cores have found of the rows that each has `written`, [cores, B]."""
    cores, batch, heads, terms, rows, width = out.shape
    lse = jnp.where(written[:, :, None, None], lse, -jnp.inf)
    flat = out.swapaxes(3, 4).reshape(cores, batch, heads, rows, -1)
    both, lse = combine([(flat[core], lse[core]) for core in range(cores)])
    return both.reshape(batch, heads, rows, terms, width).swapaxes(2, 3), lse
