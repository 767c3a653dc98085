"""What a compressor leaves of a prompt, in arrays whose shapes no prompt changes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from fusedkv_jax.cache import KVCache
from fusedkv_jax.compression.compressor import Chunk, Compressor
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.generation.compressed_prefill import run_compressed
from fusedkv_jax.model import Decoder
from fusedkv_jax.serving.settings import ServingSettings


def compressed_row(
    config: ModelConfig, settings: ServingSettings, length: int, max_output_len: int
) -> KVCache:
    """Shapes of what a prompt leaves, in arrays of so many columns, with room for an output.

    Raises:
        CompressionError: the compressor does not serve the model, or the storage type.
    """
    compressor = settings.compression
    assert compressor is not None
    compressor.check(config)
    create = functools.partial(KVCache.create, config, batch_size=1, dtype=settings.cache_dtype)
    width = chunk_width(config, compressor, settings, length)

    def left(params: nnx.State) -> KVCache:
        ones = jnp.ones(1, jnp.int32)
        chunk = Chunk(jnp.zeros((1, width), jnp.int32), ones, length)
        cache = create(max_length=length + max_output_len)
        return run_compressed((graph, params), config, compressor, [chunk], cache)[1]

    graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return jax.eval_shape(left, params)


def chunk_width(
    config: ModelConfig, compressor: Compressor, settings: ServingSettings, length: int
) -> int:
    """Columns of a chunk of a prompt; all where it cannot be cut."""
    least = compressor.least_chunk
    if least is None or config.kv_layout.is_cyclic:
        return length
    return min(max(settings.max_num_batched_tokens, least), length)
