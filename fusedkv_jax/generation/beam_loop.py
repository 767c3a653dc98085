"""The search of `beam_search`: one compiled loop, rows of the cache follow their beams."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PyTree

from fusedkv_jax.cache import KVCache
from fusedkv_jax.generation.rows import take_rows
from fusedkv_jax.model import Decoder
from fusedkv_jax.trees import Leaf


class Sizes(NamedTuple):
    """Static sizes of a search: beams of each prompt W, and room for output tokens M."""

    width: int
    most: int


_IMPOSSIBLE = -1e30  # a sum of log-probabilities that no sequence has


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "sums", "length", "done", "done_sums", "done_scores", "done_lengths"]
    + ["ended", "cache"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Beams:
    """The search of a batch: W beams of each prompt, outputs of up to M tokens.

    Attributes:
        tokens: outputs of the beams that go on, [B, W, M].
        sums: their log-probabilities, [B, W].
        length: tokens in each of them, [].
        done: complete outputs, best first, [B, W, M].
        done_sums, done_scores, done_lengths: theirs, [B, W].
        ended: prompts whose search is over, [B].
        cache: one row for each beam, B * W rows.
    """

    tokens: Leaf
    sums: Leaf
    length: Leaf
    done: Leaf
    done_sums: Leaf
    done_scores: Leaf
    done_lengths: Leaf
    ended: Leaf
    cache: KVCache

    @classmethod
    def create(cls, sizes: Sizes, ended: Bool[Array, "B"], cache: KVCache) -> Beams:
        """The search before its first token: one beam, the others impossible."""
        rows, (width, most) = ended.shape[0], sizes
        tokens = jnp.zeros((rows, width, most), jnp.int32)
        none = jnp.full((rows, width), _IMPOSSIBLE, jnp.float32)
        lengths = jnp.zeros((rows, width), jnp.int32)
        return cls(
            tokens, none.at[:, 0].set(0), jnp.int32(0), tokens, none, none, lengths, ended, cache
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["most", "stops", "penalty", "early", "ended"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Limits:
    """What ends a search.

    Attributes:
        most: output tokens of each prompt at most, [B].
        stops: tokens that end an output, padded with -1, [n].
        penalty: exponent of the length, [].
        early: `early_stopping`: 0 False, 1 True, 2 "never", [].
        ended: rows that only pad the batch, [B].
    """

    most: Leaf
    stops: Leaf
    penalty: Leaf
    early: Leaf
    ended: Leaf


@functools.partial(jax.jit, static_argnames=("graph", "sizes"), donate_argnames="cache")
def search(
    graph: nnx.GraphDef[Decoder],
    params: PyTree,
    logits: Float[Array, "R V"],
    cache: KVCache,
    limits: Limits,
    sizes: Sizes,
) -> Beams:
    """Search until it has ended for all prompts.

    Args:
        graph: structure of the model.
        params: its parameters.
        logits: what prefill gave, a row for each beam.
        cache: what prefill gave, a row for each beam; it is donated.
        limits: what ends the search.
        sizes: of its arrays.
    """
    model = nnx.merge(graph, params)

    def step(beams: Beams) -> Beams:
        place = jnp.maximum(beams.length - 1, 0)
        last = jax.lax.dynamic_index_in_dim(beams.tokens, place, 2, keepdims=False)
        count = jnp.repeat((~beams.ended).astype(jnp.int32), beams.sums.shape[1])
        logits, cache = model.extend(last.reshape(-1, 1), count, beams.cache)
        assert logits is not None
        return grow(dataclasses.replace(beams, cache=cache), logits, limits)

    start = Beams.create(sizes, limits.ended, cache)
    first = grow(start, logits, limits)
    return jax.lax.while_loop(lambda beams: ~jnp.all(beams.ended), step, first)


def grow(beams: Beams, logits: Float[Array, "R V"], limits: Limits) -> Beams:
    """Continue every beam by one token."""
    rows, width, _ = beams.tokens.shape
    length = beams.length + 1
    values = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(rows, width, -1)
    sums = (beams.sums[:, :, None] + values).reshape(rows, -1)  # [B, W * V]
    # A beam has one continuation that ends for each stop token, so W of these go on, if any W do.
    count = min(width * (1 + limits.stops.shape[0]), sums.shape[1])
    sums, index = jax.lax.top_k(sums, count)
    parent, token = index // values.shape[-1], index % values.shape[-1]
    tokens = jnp.take_along_axis(beams.tokens, parent[:, :, None], axis=1)
    tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, beams.length, 2)

    stops = jnp.any(token[:, :, None] == limits.stops, axis=-1)
    at_end = (length >= limits.most)[:, None]
    best = jnp.arange(count) < width
    complete = (stops | at_end) & best & (sums > _IMPOSSIBLE / 2)
    scores = jnp.where(complete, sums / length.astype(jnp.float32) ** limits.penalty, _IMPOSSIBLE)
    merged = _best(
        width,
        (beams.done_scores, beams.done, beams.done_sums, beams.done_lengths),
        (scores, tokens, sums, jnp.broadcast_to(length, sums.shape)),
    )
    going, order = jax.lax.top_k(jnp.where(stops, _IMPOSSIBLE, sums), width)
    kept = jnp.take_along_axis(tokens, order[:, :, None], axis=1)
    parents = jnp.take_along_axis(parent, order, axis=1)

    def unless_ended(new: Array, old: Array) -> Array:
        ended = beams.ended.reshape(-1, *[1] * (new.ndim - 1))
        return jnp.where(ended, old, new)

    done_scores, done, done_sums, done_lengths = merged
    new = dataclasses.replace(
        beams,
        tokens=unless_ended(kept, beams.tokens),
        sums=unless_ended(going, beams.sums),
        length=length,
        done=unless_ended(done, beams.done),
        done_sums=unless_ended(done_sums, beams.done_sums),
        done_scores=unless_ended(done_scores, beams.done_scores),
        done_lengths=unless_ended(done_lengths, beams.done_lengths),
    )
    ended = beams.ended | at_end[:, 0] | _cannot_improve(new, limits)
    cache = take_rows(beams.cache, (jnp.arange(rows)[:, None] * width + parents).reshape(-1))
    return dataclasses.replace(new, ended=ended, cache=cache)


def _best(width: int, kept: tuple, new: tuple) -> tuple:
    """The best `width` of complete outputs and new ones, by their scores, the first of each."""
    both = [jnp.concatenate(pair, axis=1) for pair in zip(kept, new, strict=True)]
    _, order = jax.lax.top_k(both[0], width)
    return tuple(
        jnp.take_along_axis(array, order.reshape(*order.shape, *[1] * (array.ndim - 2)), axis=1)
        for array in both
    )


def _cannot_improve(beams: Beams, limits: Limits) -> Array:
    """Prompts with all outputs complete, where what goes on is not to beat the worst of them."""
    length = beams.length.astype(jnp.float32)
    # A sum is negative and only falls: at a positive penalty it scores best at the full length.
    longest = jnp.where(limits.penalty > 0, limits.most.astype(jnp.float32), length)
    hope = jnp.max(beams.sums, axis=1)
    attainable = hope / jnp.where(limits.early == 2, longest, length) ** limits.penalty
    worst = jnp.min(beams.done_scores, axis=1)
    full = worst > _IMPOSSIBLE / 2
    return full & ((limits.early == 1) | (attainable <= worst))
