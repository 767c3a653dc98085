"""The kernel that copies by hand, on the simulator of TPU memories, with race detection.

The simulator copies when a copy is awaited, fills fresh memory with NaN and refuses to read out
of bounds; values are compared as well, since it misses a buffer that is read before its own wait.
A copy that nobody awaits never happens then: where copies are "eager", it does, and is counted.
"""

import contextlib
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator  # private
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import Pages, tpu
from pallas_kernels.tpu import decode_inputs, ragged, ragged_inputs
from tests.oracles import attention as oracle
from tests.pallas_kernels.cases import I32, call_of, close, draw, paged_call_of, ragged_call_of
from tests.pallas_kernels.ragged_cases import Step, expected, make


def simulated(function, *arguments, cores=1, copies="on_wait"):
    """The result of `function(*arguments, interpret=...)`, which must not have raced, nor have left
    a copy that it did not await."""
    settings = pltpu.InterpretParams(
        num_cores_or_threads=cores,
        detect_races=True,
        dma_execution_mode=copies,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            found = jax.block_until_ready(function(*arguments, interpret=settings))
        races = simulator.races
        assert races is None or not races.races_found
        assert "non-zero count" not in printed.getvalue()  # of a semaphore at the kernel's end
        return found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_contiguous_cache_in_several_blocks(monkeypatch):
    monkeypatch.setattr(decode_inputs, "BLOCK_BYTES", 128 * 16 * 4 * 4)  # blocks of 128 tokens
    lengths = I32([384, 130, 0])
    arguments, _ = draw("simulated", (3, 1, 384, 4, 1, 16, 16, 2, 2))
    want = oracle.attention(*arguments, {"kv_lengths": lengths})
    absent = np.arange(384)[None, :, None, None] >= lengths[:, None, None, None]
    q, keys, values, *weights = arguments
    spoil = lambda side: tuple(np.where(absent, np.nan, x) for x in side)  # noqa: E731
    arguments = jax.tree.map(jnp.asarray, (q, spoil(keys), spoil(values), *weights))

    def attend(*arguments, interpret):
        call = call_of(arguments, {"kv_lengths": lengths, "scale": 0.25})
        return tpu.attention(call, chip="v5e", interpret=interpret)

    jax.tree.map(close, tuple(simulated(attend, *arguments)), want[:2])


def test_pages_in_several_blocks(monkeypatch):
    monkeypatch.setattr(
        decode_inputs, "BLOCK_BYTES", 1
    )  # as few pages in a block as fill the lanes
    lengths, size = I32([250, 140]), 64
    (q, keys, values, *weights), _ = draw("pages", (2, 1, 256, 4, 2, 16, 16, 2, 2))
    want = oracle.attention(q, keys, values, *weights, {"kv_lengths": lengths, "window": 130})
    pages = Pages.create(
        num_pages=9, page_size=size, num_kv_heads=2, num_keys=2, num_values=2, key_size=16,
        value_size=16, dtype="float32",
    )  # fmt: skip
    pages = Pages(jnp.full_like(pages.data, jnp.nan), None, 2, 2, 16, 16)
    table = jnp.asarray(I32([[7, 2, 0, 5], [3, 8, 1, 4]]))
    at = np.arange(256)
    positions = jnp.asarray(np.where(at < lengths[:, None], at, -1).astype(np.int32))
    pages = pages.write(*jax.tree.map(jnp.asarray, (keys, values)), table, positions)

    def attend(q, pages, table, lengths, weights, interpret):
        call = paged_call_of(q, pages, table, lengths, *weights, window=130, scale=0.25)
        return tpu.paged_attention(call, chip="v5e", interpret=interpret)

    arguments = (
        jnp.asarray(q),
        pages,
        table,
        jnp.asarray(lengths),
        jax.tree.map(jnp.asarray, weights),
    )
    jax.tree.map(close, tuple(simulated(attend, *arguments)), want[:2])


def test_the_detector_detects():
    """A buffer that the next copy overwrites while it is read."""

    def kernel(x, out, buffer, sem):
        first = pltpu.make_async_copy(x.at[0], buffer, sem)
        second = pltpu.make_async_copy(x.at[1], buffer, sem)
        first.start()
        second.start()
        first.wait()
        out[...] = buffer[...]
        second.wait()

    def call(x, interpret):
        return pl.pallas_call(
            kernel,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
            interpret=interpret,
        )(x)

    with pytest.raises(AssertionError):
        x = jnp.arange(2 * 8 * 128, dtype=jnp.float32).reshape(2, 8, 128)
        close(simulated(call, x), x[0])


@pytest.mark.parametrize(
    ("chip", "cores", "copies"), [("v5e", 1, "on_wait"), ("v5p", 2, "on_wait"), ("v5p", 2, "eager")]
)
def test_chunks_and_single_tokens_over_pages(monkeypatch, chip, cores, copies):
    """Several blocks of queries, of keys, and pieces of work behind each other, or side by side.

    Of two cores the first has one piece of one unit, the second three, the first of two units: a
    core that goes by the other's list races, or awaits other copies than it has started.
    """
    step = Step((1, 9, 1), (150, 9, 30), sources=(1, 2), dtype="int8", page_size=64, tile=16)
    monkeypatch.setattr(ragged, "_KEY_TOKENS", 128)
    monkeypatch.setattr(ragged_inputs, "_BLOCK_ROWS", 32)
    made = make(step)

    # One program: the simulator's callbacks may wait for operations that follow one by one.
    @functools.partial(jax.jit, static_argnames="interpret")
    def attend(q, keys, values, rows, weights, interpret):
        call = ragged_call_of(q, keys, values, rows, *weights)
        return tpu.ragged_attention(call, chip=chip, interpret=interpret)

    arguments = jax.tree.map(jnp.asarray, (made.q, made.keys, made.values, made.rows, made.weights))
    found = simulated(attend, *arguments, cores=cores, copies=copies)
    jax.tree.map(close, tuple(found), expected(step, made))
