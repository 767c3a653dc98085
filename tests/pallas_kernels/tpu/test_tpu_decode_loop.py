"""A decode loop of the real model with the TPU kernels, compiled for a chip."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import fusedkv_jax as fkv
from pallas_kernels import tpu
from tests.pallas_kernels.tpu import calls

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu"
)


@needs_libtpu
@pytest.mark.slow
def test_decode_loop_of_sixteen_layers_updates_its_cache_in_place():
    """The real model, compiled for v5e: every byte of the cache is aliased, nothing is rebuilt."""
    rows, length, steps = 8, 4096, 64
    config = fkv.ModelConfig(
        vocab_size=512, num_layers=16, d_model=1024, num_heads=8, num_kv_heads=8, head_dim=80,
        d_ff=512, layout="fusedkv", dtype="bfloat16",
        param_dtype="bfloat16", attention="tpu",
    )  # fmt: skip
    graph, state = nnx.split(nnx.eval_shape(lambda: fkv.Decoder(config, rngs=nnx.Rngs(0))))
    with tpu.compiling_for("v5e"):
        cache = jax.eval_shape(
            lambda: fkv.KVCache.create(config, batch_size=rows, max_length=length)
        )

    def loop(state, tokens, cache):
        model = nnx.merge(graph, state)

        def step(_, carry):
            logits, cache = fkv.decode_step(model, *carry)
            return jnp.argmax(logits, -1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, steps, step, (tokens, cache))

    program = tpu.compile_for("v5e", loop, state, calls.integers(rows), cache, donate=(2,))
    memory: Any = program.memory_analysis()
    text = program.as_text() or ""
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert 0 <= memory.alias_size_in_bytes - stored < 4096  # small arrays are padded
    assert text.count('custom_call_target="tpu_custom_call"') >= 2  # storing and rebuilt layers
    # Nothing is copied out of the stacked cache, nor rebuilt, though no head fills the lanes.
    stream = rows * length * 8 * 80 * 2
    assert memory.peak_memory_in_bytes - memory.argument_size_in_bytes < 0.5 * stream
