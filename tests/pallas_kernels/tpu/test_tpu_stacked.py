"""Decoding from the stacked array of a cache: numbers, memory, and what else can read it."""

import importlib.util
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Stacked, quantize, tpu
from pallas_kernels.tpu import chips, decode_inputs, folded
from tests.oracles import attention as oracle
from tests.pallas_kernels.cases import I32, as_jax, call_of, close, draw
from tests.pallas_kernels.tpu import calls
from tests.pallas_kernels.tpu.test_tpu_simulated import simulated

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu"
)


def stack(side, absent, dtype=None):
    """The sources in one array, the last first; between them, and where tokens are absent, NaN."""
    count, size = len(side), side[0].shape[-1]
    parts = []
    for x in reversed(side):
        parts += [np.where(absent[..., None, None], np.nan, x), np.full_like(x, np.nan)]
    whole = jnp.asarray(np.stack(parts))
    flat = lambda x: x.reshape(*x.shape[:3], -1)  # noqa: E731
    slots = [jnp.int32(2 * (count - 1 - j)) for j in range(count)]
    if dtype is None:
        return tuple(Stacked(flat(whole), slot, size) for slot in slots)
    codes = quantize(jnp.nan_to_num(whole), dtype)
    scale = jnp.where(jnp.asarray(np.isnan(whole).any(-1)), jnp.nan, codes.scale[..., 0])
    return tuple(Stacked(flat(codes.data), slot, size, scale) for slot in slots)


def absent_tokens(shape, lengths):
    return np.arange(shape[2]) >= lengths[:, None]


def test_several_blocks_of_which_the_last_is_no_whole_one(monkeypatch):
    """As the simulator of TPU memories has it, where a race or a read of nothing is an error."""
    shape, lengths = (3, 1, 320, 4, 2, 16, 16, 2, 2), I32([320, 130, 0])
    monkeypatch.setattr(decode_inputs, "BLOCK_BYTES", 128 * 4 * 32 * 4)  # of 128 tokens
    (q, keys, values, a, b), _ = draw("stacked", shape)
    want = oracle.attention(q, keys, values, a, b, {"kv_lengths": lengths})
    absent = absent_tokens(shape, lengths)
    arguments = jax.tree.map(jnp.asarray, (q, stack(keys, absent), stack(values, absent), a, b))

    def attend(*arguments, interpret):
        call = call_of(arguments, {"kv_lengths": lengths, "scale": 0.25})
        return tpu.attention(call, chip="v5e", interpret=interpret)

    jax.tree.map(close, tuple(simulated(attend, *arguments)), want[:2])


CALLS = {
    "nine tokens of heads of 80": ((2, 9, 48, 6, 2, 80, 80, 2, 2), None, {}),
    "a ring": ((2, 1, 40, 4, 4, 16, 24, 1, 1), None, {"window": 16}),
    "8 bits": ((2, 2, 48, 6, 2, 16, 16, 2, 2), "int8", {}),
    "keys mixed, values reused": ((1, 3, 33, 3, 1, 32, 16, 2, 1), None, {"softcap": 3.0}),
    "segments": (
        (2, 3, 24, 4, 2, 16, 16, 2, 2), None,
        {
            "q_segment_ids": I32([[1, 1, 2], [-1, 0, 3]]),
            "kv_segment_ids": I32([[0] * 7 + [1] * 13 + [2] * 4, [0] * 20 + [-1] * 4]),
        },
    ),
    # In blocks of 128 tokens, and 5 (fp32) or 13 (8 bits) that fill no tile of memory.
    "70 tokens, an odd length": ((1, 70, 301, 4, 2, 16, 16, 1, 2), None, {}),
    "70 tokens, an odd length, 8 bits": ((1, 70, 301, 4, 2, 16, 16, 1, 2), "int8", {"window": 90}),
}  # fmt: skip
# The last is the one before, and more. XLA reads what it cuts out, and has few ways to be wrong.
QUICK = {
    *(("tpu", name) for name in CALLS if name != "70 tokens, an odd length"),
    *(("xla", name) for name in ("8 bits", "a ring")),
}


@pytest.mark.parametrize(
    "implementation, name",
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in itertools.product(("tpu", "xla"), CALLS)
    ],
)
def test_equals_the_sources_apart(monkeypatch, implementation, name):
    shape, dtype, options = CALLS[name]
    if "odd" in name:
        monkeypatch.setattr(decode_inputs, "BLOCK_BYTES", 1)
    # Nothing may go to the kernel for sequences, for which streams are cut out and turned round.
    monkeypatch.setattr(folded, "folded", None)
    (q, keys, values, a, b), _ = draw(name, shape)
    rng = np.random.default_rng(0)
    lengths = I32(rng.integers(shape[1], shape[2] + 1, shape[0]))
    options: dict[str, Any] = options | {"kv_lengths": lengths}
    if name == "a ring":
        options["kv_positions"] = I32(rng.permuted(np.tile(np.arange(shape[2]), (2, 1)), axis=1))
        options["q_positions"] = I32([[30], [17]])
    sides: Any = [stack(side, absent_tokens(shape, lengths), dtype) for side in (keys, values)]
    if dtype is not None:
        keys, values = ([np.asarray(x.read().dequantize()) for x in side] for side in sides)
    want = oracle.attention(q, keys, values, a, b, options)
    q, *weights = as_jax((q, a, b))
    options = as_jax(options)
    if implementation == "tpu":
        call = call_of((q, *sides, *weights), options)
        found = tpu.attention(call, chip="v5e", interpret=True)
    else:
        found = pallas_kernels.attention(
            q, *sides, *weights, implementation="xla", return_residuals=True, **options
        )
    jax.tree.map(close, tuple(found), want[:2])


def test_arrays_that_do_not_fit_are_named():
    data, q = jnp.zeros((2, 1, 8, 32)), jnp.zeros((1, 1, 2, 16))
    ours = (Stacked(data, 0, 16),)
    with pytest.raises(ValueError, match=r"values\[0\].data has shape .* K, H\] with H = 24"):
        pallas_kernels.attention(q, ours, (Stacked(data, 0, 24),))
    with pytest.raises(ValueError, match=r"keys\[0\].scale has shape .*must be \[P, B, S, K\]"):
        pallas_kernels.attention(q, (Stacked(data, 0, 16, data),), ours)


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "queries"),
    # The last: more rows of queries than one product takes.
    [*((chip, 1) for chip in chips.CHIPS), ("v5e", 17)],
)
def test_compiles_without_a_copy_of_any_stream(chip, queries):
    """Of sixteen streams with heads that fill no lanes, two of keys and two of values are read."""
    streams, rows, length, heads, size = 16, 4, 4096, 8, 80
    stored = calls.spec(streams, rows, length, heads * size)
    weights = calls.floats(2, heads, size)

    def call(q, data, slot, a, b, lengths):
        keys = tuple(Stacked(data, slot + i, size) for i in (0, 5))
        values = tuple(Stacked(data, slot + i, size) for i in (3, 9))
        call = call_of((q, keys, values, a, b), {"kv_lengths": lengths, "scale": 0.1})
        return tpu.attention(call, chip=chip)

    specs = (calls.spec(rows, queries, 16, size), stored, calls.integers(), weights, weights)
    compiled: Any = tpu.compile_for(chip, call, *specs, calls.integers(rows))
    stream = rows * length * heads * size * 2
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * stream
    assert 'custom_call_target="tpu_custom_call"' in compiled.as_text()
