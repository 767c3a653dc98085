"""Prefill and single decode steps: a cache goes in, logits and the extended cache come out."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache import KVCache, cache_plan
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.model import Decoder


def prefill(
    model: Decoder, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], cache: KVCache
) -> tuple[Float[Array, "B V"], KVCache]:
    """Run prompts, or their next chunk, and fill the cache.

    Tokens pass through the layers that cache something; only each row's last token runs further.

    Args:
        model: the model.
        tokens: int32 prompts, right-padded.
        lengths: int32 number of tokens in each row.
        cache: a cache with room for them; it is donated, use the returned one.

    Returns:
        Logits of each row's last token, float32, and the extended cache.

    Raises:
        ValueError: more tokens than a row of the cache can hold.
    """
    capacity = cache_capacity(model.config, cache)
    if capacity is not None and tokens.shape[1] > capacity:
        raise ValueError(
            f"tokens has {tokens.shape[1]} columns but the cache holds {capacity} tokens a row;"
            " create it with a larger max_length"
        )
    graph, state = nnx.split(model)
    return _extend(graph, state, tokens, jnp.asarray(lengths, jnp.int32), cache)


def decode_step(
    model: Decoder, tokens: Int[Array, "B"], cache: KVCache
) -> tuple[Float[Array, "B V"], KVCache]:
    """Add one token per row.

    Args:
        model: the model.
        tokens: int32 next token of each row.
        cache: the cache; it is donated, use the returned one.

    Returns:
        Logits that follow the token, float32, and the extended cache.
    """
    graph, state = nnx.split(model)
    one = jnp.ones(tokens.shape[0], jnp.int32)
    return _extend(graph, state, tokens[:, None], one, cache)


def cache_capacity(config: ModelConfig, cache: KVCache) -> int | None:
    """Tokens that a row can hold; None where all streams are rings as long as their window."""
    windows = cache_plan(config.kv_layout).windows
    limits = [
        array.shape[2]
        for arrays in (cache.keys, cache.values)
        for window, array in zip(windows, arrays, strict=True)
        if array is not None and array.shape[2] != window
    ]
    return min(limits, default=None)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def _extend(graph: nnx.GraphDef[Decoder], state: Any, tokens, count, cache):
    return nnx.merge(graph, state).extend(tokens, count, cache)
