"""Rates leave out what compiling takes."""

import time

import jax
import jax.numpy as jnp
import pytest

from fusedkv_jax.generation.compile_time import CompileTime, compile_time


def test_spans_within_spans_count_once():
    spent = CompileTime()
    for start, end in ((1, 2), (3, 4), (2.5, 6), (7, 8)):  # the third holds the second
        spent.add(start, end)
    assert spent.since(0) == 1 + 3.5 + 1
    assert spent.since(5) == 1 + 1
    assert spent.since(9) == 0


@pytest.mark.usefixtures("fresh_compilation")
def test_a_first_call_compiles_and_a_second_does_not():
    clock, start = compile_time(), time.perf_counter()
    function = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x.T))
    function(jnp.ones((3, 5))).block_until_ready()
    first, middle = clock.since(start), time.perf_counter()
    assert 0 < first <= middle - start
    function(jnp.ones((3, 5))).block_until_ready()
    assert clock.since(middle) == 0
