"""Bytes that a KV cache holds, and bytes that decoding one token reads from it."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from fusedkv_jax.cache import kivi
from fusedkv_jax.cache.cache import check_int4
from fusedkv_jax.cache.storage import SCALE_TYPE, storage_type
from fusedkv_jax.cache.storage_types import EIGHT_BITS
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.costs.arguments import check
from fusedkv_jax.costs.visible import visible_to_last
from fusedkv_jax.layouts import KINDS, Kind


def cache_bytes_per_token(config: ModelConfig, dtype: DTypeLike = "bfloat16") -> int:
    """Bytes that one more token adds to the cache: the widths of all cached streams, and scales.

    Windowed streams are among them, though they stop growing at their window (`cache_bytes`).
    With int4 it is what a token comes to once it is quantized.
    """
    check(config)
    total = 0
    for kind in KINDS:
        for i in config.kv_layout.cached(kind):
            if _in_four_bits(config, kind, i, dtype):
                total += _codes(config, kind, kivi.GROUP) / kivi.GROUP
            else:
                total += _plain(config, kind, 1, dtype)
    return math.ceil(total)


def cache_bytes(
    config: ModelConfig, batch_size: int, length: int, dtype: DTypeLike = "bfloat16"
) -> int:
    """Bytes of the streams of `KVCache.create(config, batch_size, max_length=length, dtype)`.

    A stream keeps `length` tokens, or the last W if all its readers are windowed. With int4 it
    keeps 160 exact tokens beside the quantized ones, or all of them exact if it is no longer.
    """
    check(config, batch_size=batch_size, length=length)
    layout, total = config.kv_layout, 0
    for kind in KINDS:
        for i in layout.cached(kind):
            window = layout.stored_window(kind, i)
            old = kivi.quantized_tokens(length)
            if _in_four_bits(config, kind, i, dtype) and old:
                total += _codes(config, kind, old) + _plain(config, kind, kivi.PLACES, dtype)
            else:
                total += _plain(config, kind, min(window or length, length), dtype)
    return batch_size * total


def multi_head_bytes(config: ModelConfig, length: int, dtype: DTypeLike = "bfloat16") -> int:
    """`cache_bytes` of one sequence with keys and values of each query head in every layer.

    Nothing of the model but its sizes is asked for: one with latents (MLA) need not be a model with
    heads of `config.channels`. Where these do not go into 4 bits they are filled up until they do.
    """
    check(config, length=length)
    channels, old = config.channels, 0
    if storage_type(dtype) == "int4":
        channels += -channels % kivi.LEAST_CHANNELS
        old = kivi.quantized_tokens(length)
    shape, exact = (config.num_heads, channels), kivi.PLACES if old else length
    return config.num_layers * sum(
        _code_bytes(kind, shape, old) + _plain_bytes(shape, exact, dtype, config.dtype)
        for kind in KINDS
    )


def decode_cache_reads(config: ModelConfig, length: int, dtype: DTypeLike = "bfloat16") -> int:
    """Bytes of cache that decoding one token of one sequence reads.

    Every layer reads each cached stream that its attention needs once, over the visible keys, with
    their scales. A fusion of two streams counts both, a stream with several readers counts for
    each of them. MLA reads its latent once for scores and values (absorbed form).

    Args:
        config: the model.
        length: tokens in the cache, the decoded one included.
        dtype: of the cache.
    """
    check(config, length=length)
    layout, total = config.kv_layout, 0
    for i in range(layout.num_layers):
        visible = visible_to_last(layout, i, length)
        for kind in KINDS:
            for source in layout.attended(kind, i):
                old = 0
                if _in_four_bits(config, kind, source, dtype):
                    old = kivi.quantized_tokens(length - 1)
                total += _codes(config, kind, old) + _plain(config, kind, visible - old, dtype)
    return total


def token_bytes(config: ModelConfig, kind: Kind, dtype: DTypeLike = "bfloat16") -> float:
    """Bytes of one token of one cached stream, scales included."""
    if storage_type(dtype) == "int4":
        return _codes(config, kind, kivi.GROUP) / kivi.GROUP
    return _plain(config, kind, 1, dtype)


def _in_four_bits(config: ModelConfig, kind: Kind, layer: int, dtype: DTypeLike) -> bool:
    if storage_type(dtype) != "int4":
        return False
    check_int4(config)
    return config.kv_layout.stored_window(kind, layer) is None


def _plain(config: ModelConfig, kind: Kind, tokens: int, dtype: DTypeLike) -> int:
    """Bytes of tokens of one stream, each with a scale per head in 8 bits; of int4's exact ones."""
    return _plain_bytes(config.stream_shapes[kind], tokens, dtype, config.dtype)


def _plain_bytes(shape: tuple[int, int], tokens: int, dtype: DTypeLike, exact: DTypeLike) -> int:
    (heads, channels), name = shape, storage_type(dtype)
    scale = jnp.dtype(SCALE_TYPE).itemsize if name in EIGHT_BITS else 0
    element = jnp.dtype(exact if name == "int4" else name).itemsize
    return tokens * heads * (channels * element + scale)


def _codes(config: ModelConfig, kind: Kind, tokens: int) -> int:
    """Bytes of tokens of one stream in 4 bits, with scales and zeros."""
    return _code_bytes(kind, config.stream_shapes[kind], tokens)


def _code_bytes(kind: Kind, shape: tuple[int, int], tokens: int) -> int:
    if not tokens:  # a model whose streams cannot be in 4 bits has none
        return 0
    heads, channels = shape
    group = kivi.channel_group(kind, channels)
    groups = (tokens // kivi.GROUP if kind == "key" else tokens) * heads * channels // group
    return tokens * heads * channels // 2 + groups * 2 * jnp.dtype(kivi.SCALE_TYPE).itemsize
