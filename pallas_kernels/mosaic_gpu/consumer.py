"""A consumer: the online softmax of 64 queries over the tiles that the producers have ready.

for each tile of the run, those that need no mask first:
    s = q.key^T; give the tile of keys back, and the turn to the other consumer
    hide what is not seen; higher = max(top, max s)
    p, decay = 2^(s - higher), 2^(top - higher)
    total, out = decay total + sum p, decay out
    wait for the tile of values, and for the turn
    out = out + p.value, meanwhile wait for the next keys; give the tile of values back
out / total, and ln 2 top + log total
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.plan import ROWS, Plan, Ref, Run, Side, loaded, widened

_LAYOUT = plgpu.Layout.WGMMA
_Total = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
_HIDDEN = -2.0e38  # finite: -inf - -inf would be NaN
_LN2 = math.log(2.0)
_LOG2E = 1 / _LN2

_Hide = Callable[[Array, Array], Array]


def consume(
    plan: Plan, q: Ref, keys: Side, values: Side, run: Run, hide: _Hide, turn: Ref,
    second: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Output [ROWS, H] and lse [ROWS], both float32.

    Args:
      plan: see there.
      q: the queries, [ROWS, H] in shared memory.
      keys, values: see `Side`.
      run: the tiles.
      hide: see `hider`.
      turn: the barrier of both consumers: while one multiplies, the other exponentiates.
      second: this is the consumer that lets the other begin.
    """
    factor = 1.0 if plan.softcap else plan.scale * _LOG2E

    def take_turns() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def wait_for_keys(n: Array | int) -> None:
        @pl.when(n < run.count)
        def _wait() -> None:
            plgpu.barrier_wait(keys.ready.at[plan.slot(n)])

    def step(n: Array, carry: tuple[Array, ...], masked: bool) -> tuple[Array, ...]:
        out, top, total = carry
        slot = plan.slot(n)
        s = _scores(plan, q, keys.tiles[0].at[slot], take_turns)
        plgpu.barrier_arrive(keys.used.at[slot])
        s = _capped(plan, s) if plan.softcap else s
        s = hide(s, run.tile(n) * plan.keys) if masked else s
        higher = jnp.maximum(top, s.max(axis=1) * factor)
        decay = jnp.exp2(top - higher)
        p = jnp.exp2(s * factor - lax.broadcast_in_dim(higher, s.shape, [0]))
        out = out * lax.broadcast_in_dim(decay, out.shape, [0])
        total = total * decay + p.sum(axis=1)
        p = p.astype(q.dtype)
        out, total, higher, p = lax.optimization_barrier((out, total, higher, p))
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(values.ready.at[slot])
        plgpu.barrier_wait(turn)
        out = _added(plan, out, p, values.tiles[0].at[slot], lambda: wait_for_keys(n + 1))
        plgpu.barrier_arrive(values.used.at[slot])
        return out, higher, total

    rows = lambda x: plgpu.layout_cast(  # noqa: E731
        jnp.full((ROWS,), x, jnp.float32), _LAYOUT.reduce(1)
    )
    out = plgpu.layout_cast(jnp.zeros((ROWS, plan.size), jnp.float32), _LAYOUT)
    carry = (out, rows(max(_HIDDEN, _HIDDEN * factor) / 2), rows(0.0))
    wait_for_keys(0)
    pl.when(second)(take_turns)
    carry = lax.fori_loop(0, run.clear, functools.partial(step, masked=False), carry)
    carry = lax.fori_loop(run.clear, run.count, functools.partial(step, masked=True), carry)
    pl.when(jnp.logical_not(second))(take_turns)
    out, top, total = carry
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = out * lax.broadcast_in_dim(1 / total, out.shape, [0])
    return out, jnp.where(some, top * _LN2 + jnp.log(total), -jnp.inf)


def hider(plan: Plan, places: Sequence[Ref], batch: Array, start: Array) -> _Hide:
    """A function of scores and the first key of their tile, which hides what must not be seen.

    Args:
      plan: see there.
      places: positions of queries and keys, then their segments.
      batch: the row.
      start: the first query.
    """

    def read(ref: Ref, at: Array, count: int, axis: int) -> Array:
        row = batch if ref.shape[0] > 1 else 0
        return loaded(ref.at[row, pl.ds(at, count)], _LAYOUT.reduce(axis))

    queries = [read(x, start, ROWS, 1) for x in (places[0], *places[2:3])]

    def hide(scores: Array, first: Array) -> Array:
        across = lambda x: widened(x, scores.shape, 0, _LAYOUT)  # noqa: E731
        along = lambda x: widened(read(x, first, plan.keys, 0), scores.shape, 1, _LAYOUT)  # noqa: E731
        q_at, k_at = across(queries[0]), along(places[1])
        seen = k_at >= 0
        if plan.causal:
            seen &= k_at <= q_at
        if plan.window:
            seen &= q_at - k_at < plan.window
        if plan.segments:
            k_segment = along(places[3])
            seen &= (across(queries[1]) == k_segment) & (k_segment >= 0)
        return jnp.where(seen, scores, _HIDDEN)

    return hide


def _capped(plan: Plan, scores: Array) -> Array:
    """Base-2 logits of capped scores."""
    # tanh(x) = 1 - 2 / (exp(2 x) + 1), which has the right limits where exp overflows.
    cap = plan.softcap * _LOG2E
    return cap - 2 * cap / (jnp.exp2(scores * (2 * plan.scale * _LOG2E / plan.softcap)) + 1)


def _scores(plan: Plan, q: Ref, key: Ref, meanwhile: Callable[[], None]) -> Array:
    """q.key^T in float32; `meanwhile` is done before it is waited for."""

    def run(total: Ref) -> Array:
        plgpu.wgmma(total, q, key.transpose((1, 0)))
        meanwhile()
        return total[...]

    return pl.run_scoped(run, _Total((ROWS, plan.keys), jnp.float32))


def _added(plan: Plan, out: Array, p: Array, value: Ref, meanwhile: Callable[[], None]) -> Any:
    """out + p.value in float32; `meanwhile` is done before it is waited for."""
    if plan.interpret is not None:  # which knows no operands in registers
        out = out + jnp.dot(p, value[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # wgmma reads as copies do; what is read otherwise needs a fence
        meanwhile()
        return out

    def run(total: Ref) -> None:
        plgpu.wgmma(total, p, value)
        meanwhile()

    return pl.run_state(run)(_Total.init(out))
