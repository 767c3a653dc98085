"""Many queries on Hopper: tiles arrive by TMA, are mixed in shared memory, and feed wgmma.

A block has 128 queries of one head. Four warpgroups share it, and meet at barriers:

    two producers, one of keys and one of values, for each tile that the block sees anything of:
        wait until TMA has brought the tile of every source
        tile 0 = a_0 tile 0 + a_1 tile 1     in float32, rounded once, in its place
        say that the tile is ready, wait until the tile before it is used, and load over that
    two consumers, for 64 queries each:
        s      = scale log2(e) q.key^T       by wgmma, as soon as the tile of keys is ready
        p, ... = the online softmax of `gpu.kernels.forward`
        out    = decay out + p.value         by wgmma, p from registers

Tiles that all of the block sees come first, in a loop without positions and masks. A tile is mixed
once for 128 queries: with heads of 128 that takes about as many instructions as the softmax.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.consumer import consume, hider
from pallas_kernels.mosaic_gpu.plan import BLOCK, CHUNK, CONSUMERS, ROWS, Plan, Ref, Run, Side
from pallas_kernels.mosaic_gpu.producer import produce


def forward(
    plan: Plan,
    q: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    key_weights: Array | None,
    value_weights: Array | None,
    runs: Array,
    places: Sequence[Array],
) -> tuple[Array, Array]:
    """Output [B, T, N, H] and lse [B, N, T], filled up to whole blocks.

    Args:
      plan: see there.
      q: [B, T, N, H], 16-bit floats.
      keys, values: sources [B, S, K, H] of q's type.
      key_weights, value_weights: float32 [J, K, H], or None.
      runs: `gpu.bounds.runs` of blocks of BLOCK queries and tiles of `plan.keys`.
      places: positions of queries and keys, and with segments those of both; [B or 1, T or S],
        filled up to whole blocks and tiles.
    """
    batch, length, heads, _ = q.shape
    blocks = -(-length // BLOCK)
    weights = [x for x in (key_weights, value_weights) if x is not None]
    run = plgpu.kernel(
        functools.partial(_body, plan),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, blocks * BLOCK), jnp.float32),
        ),
        scratch_types=_scratch(plan, q.dtype),
        grid=(heads, blocks, batch),
        grid_names=("head", "block", "batch"),
        num_threads=CONSUMERS + 2,
        thread_name="warpgroup",
        # Own barriers: the automatic ones would stop a producer at each piece of a tile.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        **({} if plan.interpret is None else {"interpret": plan.interpret}),
    )
    return run(q, *keys, *values, *weights, runs, *places)


def _scratch(plan: Plan, dtype: Any) -> dict[str, Any]:
    """Shared memory: tiles of queries, keys and values, and barriers."""
    swizzled = (plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128))
    tiles = plgpu.SMEM((plan.stages, plan.keys, plan.size), dtype, transforms=swizzled)

    def barrier(arrivals: int) -> plgpu.Barrier:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=plan.stages)

    found: dict[str, Any] = {
        "q_tile": plgpu.SMEM((CONSUMERS, ROWS, plan.size), dtype, transforms=swizzled),
        "lse_tile": plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
        "q_loaded": plgpu.Barrier(num_barriers=CONSUMERS),
        "turn": plgpu.Barrier(num_arrivals=CONSUMERS),
    }
    for name, sources, changed in (
        ("keys", plan.num_keys, plan.mix_keys),
        ("values", plan.num_values, plan.mix_values or plan.absent),
    ):
        found[f"{name}_tiles"] = (tiles,) * sources
        found[f"{name}_loaded"] = barrier(sources)
        found[f"{name}_used"] = barrier(CONSUMERS)
        if changed:
            found[f"{name}_ready"] = barrier(1)
    return found


def _body(plan: Plan, q: Ref, *refs: Ref, **scratch: Any) -> None:
    """What each warpgroup of each block does."""
    sides, runs, places, out, lse = _sides(plan, refs, scratch)
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    block = runs.shape[1] - 1 - lax.axis_index("block")  # causal: the last have most to do
    row = batch if runs.shape[0] > 1 else 0
    run = Run(*(runs[row, block, j] for j in range(4)))
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < CONSUMERS)
    def _consume() -> None:
        plgpu.set_max_registers(plan.consumer_registers, action="increase")
        start = block * BLOCK + warpgroup * ROWS
        mine = pl.ds(start, ROWS)
        tile, loaded = scratch["q_tile"].at[warpgroup], scratch["q_loaded"].at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[batch, mine, head], tile, loaded)
        plgpu.barrier_wait(loaded)
        hide = hider(plan, places, batch, start)
        found, sums = consume(
            plan, tile, *sides, run, hide, scratch["turn"], warpgroup == CONSUMERS - 1
        )
        plgpu.commit_smem()  # all of the warpgroup have read the queries
        tile[...] = found.astype(tile.dtype)
        lse_tile = scratch["lse_tile"].at[warpgroup]
        lse_tile[...] = sums
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out.at[batch, mine, head])
        plgpu.copy_smem_to_gmem(lse_tile, lse.at[batch, head, mine])
        plgpu.wait_smem_to_gmem(0)

    for i, side in enumerate(sides):

        @pl.when(warpgroup == CONSUMERS + i)
        def _produce(side: Side = side) -> None:
            plgpu.set_max_registers(plan.producer_registers, action="decrease")
            kv_head = lax.div(head, jnp.int32(plan.groups))
            produce(plan, side, run, places[1], batch, kv_head)


def _sides(
    plan: Plan, refs: Sequence[Ref], scratch: dict[str, Any]
) -> tuple[tuple[Side, Side], Ref, Sequence[Ref], Ref, Ref]:
    """Keys and values, runs, places, and both outputs, of what `forward` passes after q."""
    *refs, out, lse = refs
    keys, refs = refs[: plan.num_keys], refs[plan.num_keys :]
    values, refs = refs[: plan.num_values], refs[plan.num_values :]
    key_weights, *refs = refs if plan.mix_keys else (None, *refs)
    value_weights, *refs = refs if plan.mix_values else (None, *refs)
    runs, *places = refs

    def side(name: str, sources: Sequence[Ref], weights: Ref | None, absent: bool) -> Side:
        loaded = scratch[f"{name}_loaded"]
        return Side(
            sources=sources,
            tiles=scratch[f"{name}_tiles"],
            weights=weights,
            loaded=loaded,
            ready=scratch.get(f"{name}_ready", loaded),
            used=scratch[f"{name}_used"],
            absent=absent,
        )

    both = (
        side("keys", keys, key_weights, False),
        side("values", values, value_weights, plan.absent),
    )
    return both, runs, places, out, lse
