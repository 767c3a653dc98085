"""The XLA implementation passes the cases, in memory that grows as T."""

import functools

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import xla
from pallas_kernels.xla import decode
from pallas_kernels.xla.plan import BlockPlan
from tests.pallas_kernels.attention_cases import AttentionCases
from tests.pallas_kernels.implementation import Implementation
from tests.pallas_kernels.stored_cases import PagedCases, QuantizedCases


class Xla(Implementation):
    implementation = "xla"


class TestXla(Xla, AttentionCases):
    pass


class TestXlaQuantized(Xla, QuantizedCases):
    pass


class TestXlaPaged(Xla, PagedCases):
    pass


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
