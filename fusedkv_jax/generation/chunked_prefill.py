"""Chunked prefill: prompts of different lengths run in chunks of equal width and end together."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from fusedkv_jax.cache import KVCache
from fusedkv_jax.generation.logprobs import Logprobs, score
from fusedkv_jax.generation.steps import Rows, extend, extend_parts
from fusedkv_jax.model import Decoder

Split = tuple[nnx.GraphDef[Decoder], PyTree]  # structure and parameters of a model


class PromptArrays(NamedTuple):
    """Prompts of a batch on the host.

    Attributes:
        tokens: int32, right-padded, [B, T].
        lengths: int32 tokens in each row, 0 for a row that only pads, [B].
    """

    tokens: np.ndarray
    lengths: np.ndarray


class Prefilled(NamedTuple):
    """What prefill gives.

    Attributes:
        logits: of each row's last token, float32 [B, V]; None where they were not wanted.
        cache: holds the prompts.
        scores: of the prompts' tokens, arrays on the host: place i holds those of token i + 1.
    """

    logits: Float[Array, "B V"] | None
    cache: KVCache
    scores: Logprobs | None = None


@dataclass(frozen=True)
class PrefillPlan:
    """How prompts are prefilled.

    Attributes:
        width: tokens of a row in one chunk at most; None for all at once.
        final: rows of the last chunk whose logits are wanted: `last`, or `none`.
        k: score the prompts through all layers, with this many likeliest tokens; None for not.
        ends: where the parts end, which devices take along `context`; None for no parts.
    """

    width: int | None = None
    final: Rows = "last"
    k: int | None = None
    ends: tuple[int, ...] | None = None


def run_chunks(split: Split, prompts: PromptArrays, cache: KVCache, plan: PrefillPlan) -> Prefilled:
    """Prefill whole prompts, in chunks or, into an empty cache, in parts.

    Args:
        split: the model.
        prompts: the prompts.
        cache: the cache to extend; it is donated.
        plan: how.
    """
    tokens, lengths = prompts
    if plan.ends is not None:
        arrays = jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32)
        return Prefilled(*extend_parts(*split, *arrays, cache, plan.ends))
    width = plan.width or tokens.shape[1]
    if plan.k is not None:
        return _run_and_score(split, prompts, cache, width, plan.k)
    logits, parts = None, prompt_chunks(prompts, width)
    for number, (part, count) in enumerate(parts, 1):
        rows: Rows = plan.final if number == len(parts) else "none"
        logits, cache = extend(*split, part, count, cache, rows)
    return Prefilled(logits, cache)


def prompt_chunks(prompts: PromptArrays, width: int) -> list[tuple[Array, Array]]:
    """Tokens [B, t] and their number in each row [B] of every chunk, on the device."""
    tokens, lengths = prompts
    width = min(width, tokens.shape[1])
    return [
        (jnp.asarray(_columns(tokens, starts, width)), jnp.asarray(counts))
        for starts, counts in chunks(lengths, width)
    ]


def chunks(lengths: np.ndarray, width: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(first token, number of tokens) of every row in each chunk of at most `width` tokens.

    All rows end in the last chunk, which alone has rows in the upper layers, and their last chunks
    are full where they can be, as compressors want to see the last tokens together. For example
    lengths 5 and 2 in chunks of 2: counts (1, 0), (2, 0), (2, 2).
    """
    plan = []
    for late in reversed(range(-(-int(lengths.max()) // width))):
        stops = np.maximum(lengths - late * width, 0)
        starts = np.maximum(stops - width, 0)
        plan.append((starts.astype(np.int32), (stops - starts).astype(np.int32)))
    return plan


def _columns(tokens: np.ndarray, starts: np.ndarray, size: int) -> np.ndarray:
    """`size` tokens of each row from its own start on; beyond the end the last ones again."""
    places = np.minimum(starts[:, None] + np.arange(size), tokens.shape[1] - 1)
    return np.take_along_axis(tokens, places, axis=1)


def _run_and_score(
    split: Split, prompts: PromptArrays, cache: KVCache, width: int, k: int
) -> Prefilled:
    tokens, lengths = prompts
    size = min(width, tokens.shape[1])
    following = np.roll(tokens, -1, axis=1)
    logits, scores = None, jax.tree.map(np.array, Logprobs.empty(len(tokens), tokens.shape[1], k))
    for starts, counts in chunks(lengths, size):
        part, targets = (jnp.asarray(_columns(x, starts, size)) for x in (tokens, following))
        chunk = ScoredChunk(part, jnp.asarray(counts), targets)
        logits, found, cache = _extend_and_score(*split, chunk, cache, k)
        for row, (start, length) in enumerate(zip(starts, counts, strict=True)):
            for kept, new in zip(jax.tree.leaves(scores), jax.tree.leaves(found), strict=True):
                kept[row, start : start + length] = new[row, :length]
    return Prefilled(logits, cache, scores)


class ScoredChunk(NamedTuple):
    """A chunk of prompts [B, T], the number of its tokens in each row, and what follows each."""

    tokens: Int[Array, "B T"]
    count: Int[Array, "B"]
    targets: Int[Array, "B T"]


@functools.partial(jax.jit, static_argnames=("graph", "k"), donate_argnames="cache")
def _extend_and_score(
    graph: nnx.GraphDef[Decoder], params: PyTree, chunk: ScoredChunk, cache: KVCache, k: int
) -> tuple[Float[Array, "B V"], Logprobs, KVCache]:
    """Logits of each row's last token, and log-probabilities of the tokens that come next."""
    tokens, count, targets = chunk
    logits, cache = nnx.merge(graph, params).extend(tokens, count, cache, "all")
    assert logits is not None
    last = jnp.maximum(count - 1, 0)[:, None, None]
    return jnp.take_along_axis(logits, last, axis=1)[:, 0], score(logits, targets, k), cache
