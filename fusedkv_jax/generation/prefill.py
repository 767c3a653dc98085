"""Prefill and single decode steps: a cache goes in, logits and the extended cache come out.

Prompt tokens pass through the layers that cache something. The layers above run for exactly one
row of each prompt, its last token, in the last chunk, and for none in the chunks before. Only where
log-probabilities of the prompt are wanted does every token pass through all layers.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache import KVCache
from fusedkv_jax.generation.logprobs import Logprobs, score
from fusedkv_jax.generation.parts import Parts, part_ends
from fusedkv_jax.generation.placement import Placement
from fusedkv_jax.model import Decoder, check_room, extend_in_parts

Rows = Literal["last", "none"]


def prefill(
    model: Decoder,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: KVCache,
    parts: Parts | None = None,
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

    Returns:
        Logits of each row's last token, float32, and the extended cache.

    Raises:
        ValueError: more tokens than a row of the cache can hold, a length below 0 or above T, an id
            outside the vocabulary, a cache that was donated before or is of another layout, or
            parts that cannot be. The cache stays as it was. Inside `jax.jit` values are not known:
            such rows then have NaN logits from there on, as `cache.overflowed` tells.
    """
    cache.check_present()
    capacity = cache.capacity
    if capacity is not None and tokens.shape[1] > capacity:
        raise ValueError(
            f"tokens has {tokens.shape[1]} columns but the cache holds {capacity} tokens a row;"
            " create it with a larger max_length"
        )
    lengths = jnp.asarray(lengths, jnp.int32)
    check_room(model.config, tokens, lengths, cache)
    graph, state = nnx.split(model)
    if parts is None:
        return extend(graph, state, tokens, lengths, cache)
    if np.any(cache.lengths):
        raise ValueError("prefill in parts begins with an empty cache; this one holds tokens")
    ends = part_ends(tokens.shape[1], Placement.of(None).workers, parts)
    return extend_parts(graph, state, tokens, lengths, cache, ends)


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
    cache.check_present()
    graph, state = nnx.split(model)
    one = jnp.ones(tokens.shape[0], jnp.int32)
    return extend(graph, state, tokens[:, None], one, cache)


@functools.partial(jax.jit, static_argnames=("graph", "rows"), donate_argnames="cache")
def extend(
    graph: nnx.GraphDef[Decoder],
    params: Any,
    tokens: Int[Array, "B T"],
    count: Int[Array, "B"],
    cache: Any,
    rows: Rows = "last",
) -> Any:
    """`Decoder.extend` as a program of its own."""
    return nnx.merge(graph, params).extend(tokens, count, cache, rows)


@functools.partial(jax.jit, static_argnames=("graph", "ends"), donate_argnames="cache")
def extend_parts(
    graph: nnx.GraphDef[Decoder],
    params: Any,
    tokens: Int[Array, "B T"],
    count: Int[Array, "B"],
    cache: Any,
    ends: tuple[int, ...],
) -> Any:
    """`extend_in_parts` as a program of its own."""
    return extend_in_parts(nnx.merge(graph, params), tokens, count, cache, ends)


@functools.partial(jax.jit, static_argnames=("graph", "k"), donate_argnames="cache")
def _extend_and_score(graph, params, tokens, targets, count, cache, k):
    """Logits of each row's last token, and log-probabilities of the tokens that come next."""
    logits, cache = nnx.merge(graph, params).extend(tokens, count, cache, "all")
    last = jnp.maximum(count - 1, 0)[:, None, None]
    return jnp.take_along_axis(logits, last, axis=1)[:, 0], score(logits, targets, k), cache


@functools.partial(jax.jit, static_argnames=("graph", "compression"))
def compressed(graph, params, compression, tokens, count, cache):
    """Prefill by a compressor: whole prompts in, the logits and a smaller cache out."""
    return compression.prefill(nnx.merge(graph, params), tokens, count, cache)


def chunks(lengths: np.ndarray, width: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(first token, number of tokens) of every row in each chunk of at most `width` tokens.

    Short prompts join late, so that all end in the last chunk: it alone has rows in the upper
    layers. For example lengths 5 and 2 in chunks of 2: counts (2, 0), (2, 0), (1, 2).
    """
    needed = -(-lengths // width)
    plan = []
    for late in range(int(needed.max()), 0, -1):
        place = needed - late
        starts = np.maximum(place, 0) * width
        counts = np.where(place >= 0, np.minimum(width, lengths - starts), 0)
        plan.append((starts.astype(np.int32), counts.astype(np.int32)))
    return plan


def fill(
    split: tuple[nnx.GraphDef[Decoder], Any],
    prompts: np.ndarray,
    lengths: np.ndarray,
    cache: Any,
    *,
    width: int | None = None,
    final: Rows = "last",
    k: int | None = None,
    ends: tuple[int, ...] | None = None,
) -> tuple[Any, Any, Logprobs | None]:
    """Prefill whole prompts, in chunks or, into an empty cache, in parts.

    Args:
        split: structure and parameters of the model.
        prompts: int32 tokens, right-padded, [B, T].
        lengths: int32 tokens in each row, 0 for a row that only pads, [B].
        cache: the cache to extend; it is donated.
        width: tokens of a row in one chunk at most; None for all T at once.
        final: rows of the last chunk whose logits are wanted: `last`, or `none`.
        k: score the prompt through all layers, with this many likeliest tokens.
        ends: where the parts end, which devices take along `context`; None for no parts.

    Returns:
        Logits [B, V] of each row's last token (None if `none`), the cache, and with `k` the scores:
        place i holds those of token i+1.
    """
    if ends is not None:
        arrays = jnp.asarray(prompts), jnp.asarray(lengths, jnp.int32)
        return *extend_parts(*split, *arrays, cache, ends), None
    size = min(width or prompts.shape[1], prompts.shape[1])
    plan = chunks(lengths, size)
    following = np.roll(prompts, -1, axis=1)
    logits, scores = None, None if k is None else _empty_scores(prompts.shape, k)
    for number, (starts, counts) in enumerate(plan, 1):
        places = np.minimum(starts[:, None] + np.arange(size), prompts.shape[1] - 1)
        tokens = jnp.asarray(np.take_along_axis(prompts, places, axis=1))
        count = jnp.asarray(counts)
        if scores is None:
            rows: Rows = final if number == len(plan) else "none"
            logits, cache = extend(*split, tokens, count, cache, rows)
            continue
        targets = jnp.asarray(np.take_along_axis(following, places, axis=1))
        logits, found, cache = _extend_and_score(*split, tokens, targets, count, cache, k)
        for row, (start, size_here) in enumerate(zip(starts, counts, strict=True)):
            for kept, new in zip(jax.tree.leaves(scores), jax.tree.leaves(found), strict=True):
                kept[row, start : start + size_here] = new[row, :size_here]
    return logits, cache, scores


def _empty_scores(shape: tuple[int, ...], k: int) -> Logprobs:
    return Logprobs(
        np.zeros(shape, np.float32),
        np.zeros(shape, np.int32),
        np.zeros((*shape, k), np.float32),
        np.zeros((*shape, k), np.int32),
    )
