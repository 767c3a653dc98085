"""A producer: brings the tiles of one side by TMA, and mixes them where they lie.

    start the copies of as many tiles as there are slots, but one
    for each tile of the run:
        wait for its copy; mix its sources into the first one's tile; say that it is ready
        wait until both consumers have used the tile before it; copy the next one over that

One source that is neither weighted nor has absent values is ready as it is copied.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.plan import CHUNK, ROWS, Plan, Ref, Run, Side, loaded, widened


def produce(plan: Plan, side: Side, run: Run, k_at: Ref, batch: Array, kv_head: Array) -> None:
    """Has every tile of the run ready in its turn.

    Args:
      plan: see there.
      side: keys or values.
      run: the tiles.
      k_at: positions of the keys, [B or 1, S], negative where absent.
      batch, kv_head: whose tiles.
    """

    def load(n: Array | int) -> None:
        slot, start = plan.slot(n), run.tile(n) * plan.keys
        for source, tiles in zip(side.sources, side.tiles, strict=True):
            plgpu.copy_gmem_to_smem(
                source.at[batch, pl.ds(start, plan.keys), kv_head],
                tiles.at[slot],
                side.loaded.at[slot],
            )

    for n in range(plan.stages - 1):
        pl.when(n < run.count)(functools.partial(load, n))

    @pl.loop(0, run.count)
    def _next(n: Array) -> None:
        slot = plan.slot(n)
        if side.changed:
            plgpu.barrier_wait(side.loaded.at[slot])
            places = (k_at, batch if k_at.shape[0] > 1 else 0, run.tile(n) * plan.keys)
            _mix(plan, side, slot, kv_head, places, n >= run.clear)
            plgpu.commit_smem()
            plgpu.barrier_arrive(side.ready.at[slot])

        @pl.when(n + plan.stages - 1 < run.count)
        def _refill() -> None:
            @pl.when(n > 0)
            def _used() -> None:
                plgpu.barrier_wait(side.used.at[plan.slot(n - 1)])

            load(n + plan.stages - 1)

    @pl.loop(jnp.maximum(0, run.count - plan.stages), run.count)
    def _drain(n: Array) -> None:
        plgpu.barrier_wait(side.used.at[plan.slot(n)])


def _mix(
    plan: Plan, side: Side, slot: Array | int, kv_head: Array, places: tuple, masked: Array
) -> None:
    """Leaves in the first source's tile the weighted sum of all, and zero where keys are absent.

    Each thread writes what it has read itself, so no thread waits for another.
    """
    dtype = side.tiles[0].dtype
    layout = plgpu.Layout.SMEM_GMEM_COPY((ROWS, CHUNK), dtype, 128)  # 16 bytes of a thread

    def write(clearing: bool) -> None:
        for row in range(0, plan.keys, ROWS):
            present = _present(places, row, layout) if clearing else None
            for channel in range(0, plan.size, CHUNK):
                at = (slot, pl.ds(row, ROWS), pl.ds(channel, CHUNK))
                total = _weighted(side, at, (kv_head, pl.ds(channel, CHUNK)), layout)
                if present is not None:
                    total = jnp.where(present, total, 0.0)
                side.tiles[0][at] = total.astype(dtype)

    if not side.absent:
        write(False)
        return
    pl.when(masked)(functools.partial(write, True))
    if side.weights is not None:
        pl.when(jnp.logical_not(masked))(functools.partial(write, False))


def _present(places: tuple, row: int, layout: Any) -> Array:
    """bool [ROWS, CHUNK]: the key of the row is there."""
    k_at, b, start = places
    at = loaded(k_at.at[b, pl.ds(start + row, ROWS)], layout.reduce(1))
    return widened(at, (ROWS, CHUNK), 0, layout) >= 0


def _weighted(side: Side, at: tuple, channels: tuple, layout: Any) -> Array:
    """float32 [ROWS, CHUNK] of the sources; weights are read again each time, not to hold them."""
    total = None
    for j, tiles in enumerate(side.tiles):
        part = loaded(tiles.at[at], layout, optimized=True).astype(jnp.float32)
        if side.weights is not None:
            weight = loaded(side.weights.at[j, *channels], layout.reduce(0))
            part = part * widened(weight, part.shape, 1, layout)
        total = part if total is None else total + part
    assert total is not None
    return total
