"""Prefill and single decode steps: a cache goes in, logits and the extended cache come out.

Prompt tokens pass through the layers that cache something. The layers above run for exactly one
row of each prompt, its last token, in the last chunk, and for none in the chunks before. Only where
log-probabilities of the prompt are wanted does every token pass through all layers.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from fusedkv_jax.cache import KVCache
from fusedkv_jax.compression.compressor import Chunk, Compressor
from fusedkv_jax.generation.compressed_prefill import run_compressed
from fusedkv_jax.generation.parts import Parts, part_ends
from fusedkv_jax.generation.placement import mesh_workers
from fusedkv_jax.generation.settings import check_model
from fusedkv_jax.model import Decoder, check_room, extend_in_parts
from fusedkv_jax.model.checks import check_integers, known

Rows = Literal["last", "none"]


def prefill(
    model: Decoder,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: KVCache,
    parts: Parts | None = None,
    compression: Compressor | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Run prompts, or their next chunk, and fill the cache.

    Tokens pass through the layers that cache something; only each row's last token runs further.

    Args:
        model: the model.
        tokens: int32 prompts, right-padded.
        lengths: int32 number of tokens in each row.
        cache: a cache with room for them; it is donated, use the returned one.
        parts: prefill whole prompts in parts, one for each place of the `context` axis of the mesh
            that is set (`jax.set_mesh`): `equal`, `balanced`, or their relative sizes; see
            `fusedkv_jax.generation.parts`. The cache must be empty.
        compression: a compressor of `fusedkv_jax.compression`, which shrinks what whole prompts
            leave in the cache. The cache must be empty, and is not donated; S - T more tokens can
            be added to the returned one in every row.

    Returns:
        Logits of each row's last token, float32, NaN for a row of 0 tokens, which has none; and the
        extended cache.

    Raises:
        ValueError: more tokens than a row of the cache can hold, a length below 0 or above T, an id
            outside the vocabulary, a cache that was donated before or is of another layout, or
            parts that cannot be. The cache stays as it was. Inside `jax.jit` values are not known:
            such rows then have NaN logits from there on, as `cache.overflowed` tells.
    """
    _check_call(model, tokens, "B T", cache)
    given = lengths if hasattr(lengths, "dtype") else np.asarray(lengths)
    check_integers("lengths", given, "B")
    capacity = cache.capacity
    if capacity is not None and tokens.shape[1] > capacity:
        raise ValueError(
            f"tokens has {tokens.shape[1]} columns but the cache holds {capacity} tokens a row;"
            " create it with a larger max_length"
        )
    lengths = jnp.asarray(given, jnp.int32)
    check_room(model.config, tokens, lengths, cache)
    graph, state = nnx.split(model)
    counts = known(lengths)
    if parts is not None and compression is not None:
        raise ValueError("parts and compression exclude each other; give one")
    if parts is not None:
        _check_empty(cache, "prefill in parts")
        ends = part_ends(tokens.shape[1], mesh_workers(), parts)
        logits, cache = extend_parts(graph, state, tokens, lengths, cache, ends)
    elif compression is not None:
        compression.check(model.config)
        _check_empty(cache, "compression")
        whole = Chunk(tokens, lengths, tokens.shape[1])
        logits, cache = run_compressed((graph, state), model.config, compression, [whole], cache)
    else:
        logits, cache = extend(graph, state, tokens, lengths, cache)
    assert logits is not None
    if counts is None or (counts == 0).any():
        logits = jnp.where((lengths > 0)[:, None], logits, jnp.nan)
    return logits, cache


def decode_step(
    model: Decoder, tokens: Int[Array, "B"], cache: KVCache
) -> tuple[Float[Array, "B V"], KVCache]:
    """Add one token per row.

    Args:
        model: the model.
        tokens: int32 next token of each row.
        cache: the cache; it is donated, use the returned one.

    Returns:
        Logits that follow the token, float32, and the extended cache. A row that is full already,
        or is given an id outside the vocabulary, has NaN logits from then on, as `cache.overflowed`
        tells: to look at values before each step would make the host wait for the last one.

    Raises:
        ValueError: a cache that was donated before, or is of another layout or batch size.
    """
    _check_call(model, tokens, "B", cache)
    graph, state = nnx.split(model)
    one = jnp.ones(tokens.shape[0], jnp.int32)
    return extend(graph, state, tokens[:, None], one, cache)


def _check_empty(cache: KVCache, who: str) -> None:
    """Raises ValueError where a cache is known to hold tokens."""
    lengths = known(cache.lengths)
    if lengths is not None and np.any(lengths):
        raise ValueError(f"{who} begins with an empty cache; this one holds tokens")


def _check_call(model: object, tokens: ArrayLike, axes: str, cache: object) -> None:
    """Raises ValueError where the arguments are not what they are called."""
    check_model(model)
    if not isinstance(cache, KVCache):
        raise ValueError(
            f"cache is a {type(cache).__name__}; use KVCache.create(model.config, ...)"
        )
    cache.check_present()
    check_integers("tokens", tokens, axes)
    if 0 in jnp.shape(tokens):
        raise ValueError(f"tokens has shape {jnp.shape(tokens)}; use at least one")


@functools.partial(jax.jit, static_argnames=("graph", "rows"), donate_argnames="cache")
def extend(
    graph: nnx.GraphDef[Decoder],
    params: PyTree,
    tokens: Int[Array, "B T"],
    count: Int[Array, "B"],
    cache: KVCache,
    rows: Rows = "last",
) -> tuple[Array | None, KVCache]:
    """`Decoder.extend` as a program of its own."""
    return nnx.merge(graph, params).extend(tokens, count, cache, rows)


@functools.partial(jax.jit, static_argnames=("graph", "ends"), donate_argnames="cache")
def extend_parts(
    graph: nnx.GraphDef[Decoder],
    params: PyTree,
    tokens: Int[Array, "B T"],
    count: Int[Array, "B"],
    cache: KVCache,
    ends: tuple[int, ...],
) -> tuple[Float[Array, "B V"], KVCache]:
    """`extend_in_parts` as a program of its own."""
    return extend_in_parts(nnx.merge(graph, params), tokens, count, cache, ends)
