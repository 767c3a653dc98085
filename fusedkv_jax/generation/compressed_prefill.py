"""Prefill with a compressor, which observes the chunks of prompts and shrinks what they left."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from fusedkv_jax.cache import KVCache
from fusedkv_jax.cache.cache import unstacked
from fusedkv_jax.compression.compressor import Chunk, Compressor, Observed
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.model import Decoder


def run_compressed(
    split: tuple[nnx.GraphDef[Decoder], PyTree],
    config: ModelConfig,
    compressor: Compressor,
    chunks: Sequence[Chunk],
    cache: KVCache,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Run whole prompts and compress what they leave in the cache.

    Args:
        split: structure and parameters of the model.
        config: of the model.
        compressor: the compressor.
        chunks: the prompts of T columns, one chunk after the other; each row's last one has as
            many tokens as can be.
        cache: an empty cache of `KVCache.create`, S >= T tokens a row; it is donated where there
            is more than one chunk.

    Returns:
        Logits of each row's last token, float32, and a cache to which S - T more tokens can be
        added in every row.

    Raises:
        CompressionError: the storage type of the cache cannot be compressed.
    """
    cache, observed = _begin(compressor, config, cache)
    for chunk in chunks[:-1]:
        cache, observed = _observe(*split, compressor, chunk, cache, observed)
    return _compress(*split, compressor, chunks[-1], cache, observed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(compressor: Compressor, config: ModelConfig, cache: KVCache) -> tuple[KVCache, Observed]:
    return compressor.begin(config, unstacked(cache))


@functools.partial(
    jax.jit, static_argnames=("graph", "compressor"), donate_argnames=("cache", "observed")
)
def _observe(
    graph: nnx.GraphDef[Decoder],
    params: PyTree,
    compressor: Compressor,
    chunk: Chunk,
    cache: KVCache,
    observed: Observed,
) -> tuple[KVCache, Observed]:
    return compressor.observe(nnx.merge(graph, params), chunk, cache, observed)


# The cache is not donated: what comes out has other shapes, so nothing could be reused.
@functools.partial(jax.jit, static_argnames=("graph", "compressor"))
def _compress(
    graph: nnx.GraphDef[Decoder],
    params: PyTree,
    compressor: Compressor,
    chunk: Chunk,
    cache: KVCache,
    observed: Observed,
) -> tuple[Float[Array, "B V"], KVCache]:
    return compressor.compress(nnx.merge(graph, params), chunk, cache, observed)
