"""The decode loop: one compiled program for a whole batch, no Python between tokens.

Prompts and outputs share one buffer per batch, as long as the cache, in which each token sits at
its position. Shapes are rounded up to buckets, and all that differs between requests is traced, so
nothing compiles again once a bucket has been seen.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from fusedkv_jax.cache import KVCache
from fusedkv_jax.generation.sampling import SamplerInputs, sample
from fusedkv_jax.model import Decoder


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "lengths", "limits", "stops", "finished", "seen", "cache"],
    meta_fields=[],
)
@dataclass(frozen=True)
class DecodeState:
    """A batch while it is decoded; C is the buffer's length.

    Attributes:
        tokens: int32 prompt and output of each row, [B, C].
        lengths: number of tokens in each row, [B].
        limits: number of tokens at which a row ends, [B].
        stops: tokens that end a row, padded with -1, [B, stops].
        finished: rows that have ended, [B].
        seen: tokens that each row contains, [B, V].
        cache: holds all of a row's tokens but the last.
    """

    tokens: Any
    lengths: Any
    limits: Any
    stops: Any
    finished: Any
    seen: Any
    cache: KVCache


@functools.partial(jax.jit, static_argnums=0, donate_argnames=("tokens", "cache"))
def start(
    graph: nnx.GraphDef[Decoder],
    params: Any,
    prompt: Int[Array, "B T"],
    tokens: Int[Array, "B C"],
    lengths: Int[Array, "B"],
    limits: Int[Array, "B"],
    stops: Int[Array, "B n"],
    cache: KVCache,
    inputs: SamplerInputs,
) -> DecodeState:
    """Prefill the prompts and choose each row's first token.

    Args:
        graph: structure of the model.
        params: its parameters.
        prompt: the prompts, right-padded to their bucket.
        tokens: the buffer, with the prompts in it.
        lengths: tokens in each prompt; 0 for a row that only pads the batch.
        limits: tokens at which each row ends.
        stops: tokens that end each row.
        cache: an empty cache.
        inputs: sampling parameters.
    """
    model = nnx.merge(graph, params)
    logits, cache = model.extend(prompt, lengths, cache)
    assert logits is not None
    rows = jnp.arange(prompt.shape[0])[:, None]
    inside = jnp.arange(prompt.shape[1]) < lengths[:, None]
    seen = jnp.zeros((prompt.shape[0], model.config.vocab_size), bool)
    seen = seen.at[rows, jnp.where(inside, prompt, model.config.vocab_size)].set(True, mode="drop")
    state = DecodeState(tokens, lengths, limits, stops, lengths == 0, seen, cache)
    return _append(state, sample(logits, inputs, lengths, seen))


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def decode(
    graph: nnx.GraphDef[Decoder], params: Any, state: DecodeState, inputs: SamplerInputs
) -> DecodeState:
    """Decode until every row has ended."""
    model = nnx.merge(graph, params)

    def some_row_is_running(state: DecodeState):
        return ~jnp.all(state.finished)

    def step(state: DecodeState) -> DecodeState:
        last = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)
        running = (~state.finished).astype(jnp.int32)
        logits, cache = model.extend(last, running, state.cache)
        assert logits is not None
        state = dataclasses.replace(state, cache=cache)
        return _append(state, sample(logits, inputs, state.lengths, state.seen))

    return jax.lax.while_loop(some_row_is_running, step, state)


def _append(state: DecodeState, token: Int[Array, "B"]) -> DecodeState:
    """Add a token to each running row, and end rows that stop with it."""
    rows = jnp.arange(token.shape[0])
    running = ~state.finished
    place = jnp.where(running, state.lengths, state.tokens.shape[1])  # out of bounds: dropped
    lengths = state.lengths + running
    stopped = jnp.any(token[:, None] == state.stops, axis=1)
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[rows, place].set(token, mode="drop"),
        lengths=lengths,
        finished=state.finished | stopped | (lengths >= state.limits),
        seen=state.seen.at[rows, token].max(running),
    )
