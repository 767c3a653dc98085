"""The XLA implementation passes the cases, in memory that grows as T."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import xla
from pallas_kernels.xla import decode
from pallas_kernels.xla.plan import BlockPlan
from tests.pallas_kernels.attention_cases import AttentionCases
from tests.pallas_kernels.implementation import Implementation
from tests.pallas_kernels.ragged_cases import RaggedKernelCases
from tests.pallas_kernels.stored_cases import PagedCases, QuantizedCases


class Xla(Implementation):
    implementation = "xla"


class TestXla(Xla, AttentionCases):
    pass


class TestXlaQuantized(Xla, QuantizedCases):
    pass


class TestXlaPaged(Xla, PagedCases):
    pass


class TestXlaRagged(Xla, RaggedKernelCases):
    ragged = ("lanes", "int8", "tiles")
    chunks = 512


def temporary_bytes(length):
    """Temporaries of forward and backward for causal self-attention."""
    array = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    weight = jax.ShapeDtypeStruct((2, 2, 16), jnp.float32)

    def loss(q, keys, values, a, b):
        return pallas_kernels.attention(q, keys, values, a, b, implementation="xla").sum()

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))
    compiled = grad.lower(array, (array,) * 2, (array,) * 2, weight, weight).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_temporary_memory_grows_linearly():
    short, long = temporary_bytes(2048), temporary_bytes(4096)
    assert long < 2.2 * short
    assert long < 4096 * 4096 * 4  # less than one score matrix


def test_tiles_that_see_nothing_are_not_visited():
    """Of 8192 keys only 100 are valid: the loop's trip count must follow the lengths."""
    mask = xla.Mask(causal=True, window=None, kv_lengths=jnp.array([100, 7]))
    queries, keys = xla.tiles.places(mask, 1, 8192)
    table = decode.blocks.active(mask, queries, keys, 1, 1024)
    assert table.tolist() == [[True] + [False] * 7]
    mask = xla.Mask(causal=True, window=16)
    queries, keys = xla.tiles.places(mask, 64, 64)
    table = decode.blocks.active(mask, queries, keys, 16, 16)
    diagonal = [[row - column in (0, 1) for column in range(4)] for row in range(4)]
    assert table.tolist() == diagonal


@pytest.mark.parametrize(
    ("shape", "schedule"),
    [
        ((1, 1, 4096), "decode"),
        ((8, 512, 512), "rows"),
        ((1, 8192, 8192), "blocks"),
        ((1, 128, 8192), "blocks"),
        ((6, 128, 128), "rows"),
    ],
)
def test_schedules_follow_the_shape(shape, schedule):
    batch, length, num_keys = shape
    mask = xla.Mask(causal=True)
    choose = functools.partial(BlockPlan.choose, (batch, length, 8, 64), (batch, num_keys, 4, 64))
    blocks = choose(mask)
    assert blocks.schedule == schedule and batch % blocks.batch == 0


@pytest.mark.parametrize("format", ["float32", "int8"])
def test_streams_of_a_cache_are_read_some_rows_at_a_time(format):
    """A few tokens of several rows against a long cache: more scores than are computed at once."""
    rng, size = np.random.default_rng(0), 8
    q = jnp.asarray(rng.normal(size=(4, 9, 16, size)), jnp.float32)
    data = jnp.asarray(rng.normal(size=(2, 4, 2048, 4, size)), jnp.float32)
    plan = BlockPlan.choose(q.shape, data.shape[1:], xla.Mask(causal=True))
    assert plan.batch < len(q)
    scale = None
    if format == "int8":
        stored = pallas_kernels.quantize(data)
        data, scale = stored.data, stored.scale[..., 0]
    sources = [pallas_kernels.Stacked(data, slot, size, scale) for slot in (0, 1)]
    options = {"kv_lengths": jnp.array([2000, 2048, 100, 9])}
    attend = functools.partial(pallas_kernels.attention, q, sources[:1], sources[1:], **options)
    expected = attend(implementation="reference")
    np.testing.assert_allclose(attend(implementation="xla"), expected, atol=2e-5)


@pytest.mark.parametrize("together", [True, False])
def test_a_stream_of_a_cache_is_read_where_it_lies(together):
    """Values and gradients are those of the stream cut out; no copy of it is made."""
    slots, batch, num_keys, heads, size = 3, 2, 8192, 2, 64
    keys = jax.random.split(jax.random.key(0), 2)
    data = jax.random.normal(keys[0], (slots, batch, num_keys, heads, size))
    if together:
        data = data.reshape(*data.shape[:3], -1)
    q = jax.random.normal(keys[1], (batch, 1, 4, size))
    lengths = jnp.array([num_keys - 5, 17])

    def run(q, data, slot, cut):
        sources = [pallas_kernels.Stacked(data, slot + i, size) for i in (0, 1)]
        sources = [x.read() for x in sources] if cut else sources
        options = {"kv_lengths": lengths, "implementation": "xla"}
        return pallas_kernels.attention(q, sources[:1], sources[1:], **options)

    read = jax.jit(run, static_argnames="cut")
    np.testing.assert_allclose(
        read(q, data, 1, cut=False), read(q, data, 1, cut=True), rtol=1e-6, atol=1e-6
    )
    loss = lambda *arguments: (run(*arguments) ** 2).sum()  # noqa: E731
    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=3)
    for found, expected in zip(grad(q, data, 1, False), grad(q, data, 1, True), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    memory = read.lower(q, data, 1, cut=False).compile().memory_analysis()
    assert memory.temp_size_in_bytes < data.nbytes / slots
