"""Bytes that a KV cache holds, and bytes that decoding one token reads from it."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
from jax.typing import DTypeLike

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.costs.visible import visible_to_last
from fusedkv_jax.layouts import KINDS


def cache_bytes_per_token(config: ModelConfig, dtype: DTypeLike = "bfloat16") -> int:
    """Bytes that one more token adds to the cache: the widths of all cached streams.

    Windowed streams are among them, though they stop growing at their window (`cache_bytes`).
    """
    return sum(width for width, _ in _streams(config)) * _element_bytes(dtype)


def cache_bytes(
    config: ModelConfig, batch_size: int, length: int, dtype: DTypeLike = "bfloat16"
) -> int:
    """Bytes of the streams of `KVCache.create(config, batch_size, max_length=length, dtype)`.

    A stream keeps `length` tokens, or the last W if all its readers are windowed.
    """
    tokens = sum(width * min(window or length, length) for width, window in _streams(config))
    return batch_size * tokens * _element_bytes(dtype)


def decode_cache_reads(config: ModelConfig, length: int, dtype: DTypeLike = "bfloat16") -> int:
    """Bytes of cache that decoding one token of one sequence reads.

    Every layer reads each cached stream that its attention needs once, over the visible keys. A
    fusion of two streams counts both, a stream with several readers counts for each of them.
    MLA reads its latent once for scores and values (absorbed form).

    Args:
        config: the model.
        length: tokens in the cache, the decoded one included.
        dtype: of the cache.
    """
    layout, total = config.kv_layout, 0
    for i in range(layout.num_layers):
        for kind in KINDS:
            heads, channels = config.stream_shapes[kind]
            total += (
                len(layout.attended(kind, i))
                * heads
                * channels
                * visible_to_last(layout, i, length)
            )
    return total * _element_bytes(dtype)


def _streams(config: ModelConfig) -> Iterator[tuple[int, int | None]]:
    """(elements per token, window) of every cached stream."""
    layout = config.kv_layout
    for kind in KINDS:
        heads, channels = config.stream_shapes[kind]
        for i in layout.cached(kind):
            yield heads * channels, layout.stored_window(kind, i)


def _element_bytes(dtype: DTypeLike) -> int:
    try:
        return jnp.dtype(dtype).itemsize
    except TypeError:
        raise ValueError(
            f"dtype={dtype!r} is no dtype; use bfloat16, float32, int8 or float8_e4m3fn"
        ) from None
