"""The decode loop: one compiled program for a whole batch, no Python between tokens.

Prompts and outputs share one buffer per batch, as long as the cache, in which each token sits at
its position. Shapes are rounded up to buckets, and all that differs between requests is traced, so
nothing compiles again once a bucket has been seen. The loop ends when every row has, or after a
number of steps, where the host wants to look at what there is: to stream it, or to find stop texts.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from fusedkv_jax.cache import KVCache
from fusedkv_jax.generation.logprobs import Logprobs
from fusedkv_jax.generation.sampling import NO_TOKEN, SamplerInputs, sample
from fusedkv_jax.model import Decoder
from fusedkv_jax.trees import Leaf


class Bounds(NamedTuple):
    """Where the output of each row begins, and what ends it.

    Attributes:
        lengths: tokens in each prompt, [B]; 0 for a row that only pads the batch.
        limits: tokens at which each row ends, [B].
        stops: tokens that end each row, padded with -1, [B, n].
    """

    lengths: Int[Array, "B"]
    limits: Int[Array, "B"]
    stops: Int[Array, "B n"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens",
        "prompts",
        "lengths",
        "limits",
        "stops",
        "finished",
        "seen",
        "counts",
        "cache",
        "logprobs",
        "extra",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class DecodeState:
    """A batch while it is decoded; C is the buffer's length.

    Attributes:
        tokens: int32 prompt and output of each row, [B, C].
        prompts: number of prompt tokens in each row, [B].
        lengths: number of tokens in each row, [B].
        limits: number of tokens at which a row ends, [B].
        stops: tokens that end a row, padded with -1, [B, stops].
        finished: rows that have ended, [B].
        seen: tokens that each row contains, [B, V].
        counts: how often each row's output contains each token, int32 [B, V].
        cache: holds all of a row's tokens but the last.
        logprobs: what is recorded of each place of the buffer, or None.
        extra: what a speculative decoder carries along, or None.
    """

    tokens: Leaf
    prompts: Leaf
    lengths: Leaf
    limits: Leaf
    stops: Leaf
    finished: Leaf
    seen: Leaf
    counts: Leaf
    cache: KVCache | None
    logprobs: Logprobs | None = None
    extra: PyTree = None

    @classmethod
    def create(
        cls,
        tokens: Int[Array, "B C"],
        bounds: Bounds,
        cache: KVCache | None,
        vocab_size: int,
        logprobs: Logprobs | None = None,
    ) -> DecodeState:
        """The state after prefill.

        Args:
            tokens: the buffer, with the prompts in it.
            bounds: where each row's output begins and ends.
            cache: holds the prompts.
            vocab_size: V.
            logprobs: empty arrays to record into.
        """
        (size, capacity), (lengths, limits, stops) = tokens.shape, bounds
        inside = jnp.arange(capacity) < lengths[:, None]
        seen = jnp.zeros((size, vocab_size), bool)
        seen = seen.at[jnp.arange(size)[:, None], jnp.where(inside, tokens, vocab_size)].set(
            True, mode="drop"
        )
        counts = jnp.zeros((size, vocab_size), jnp.int32)
        finished = lengths == 0
        return cls(tokens, lengths, lengths, limits, stops, finished, seen, counts, cache, logprobs)


# Donated arrays become the new state's own, so that a cache is never held twice.
@functools.partial(jax.jit, donate_argnames=("tokens", "cache", "logprobs"))
def begin(
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B C"],
    bounds: Bounds,
    cache: KVCache,
    inputs: SamplerInputs,
    logprobs: Logprobs | None = None,
) -> DecodeState:
    """Choose each row's first token from the logits of prefill; see `DecodeState.create`."""
    state = DecodeState.create(tokens, bounds, cache, logits.shape[1], logprobs)
    return advance(state, logits, inputs)


# The state is donated, and the loop carries it: each step updates tokens and cache in place. If it
# were not, XLA would have to copy the whole cache before the first step of every call.
@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def decode(
    graph: nnx.GraphDef[Decoder],
    params: PyTree,
    state: DecodeState,
    inputs: SamplerInputs,
    steps: Int[Array, ""] | int | None = None,
) -> DecodeState:
    """Decode until every row has ended, or for `steps` tokens a row."""
    model = nnx.merge(graph, params)

    def goes_on(carry: tuple[DecodeState, Array]) -> Bool[Array, ""]:
        state, done = carry
        # On the device: asking the host after each token would make both wait for each other.
        more = True if steps is None else done < steps
        return more & ~jnp.all(state.finished)

    def step(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, done = carry
        last = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)
        # Rows that have ended still run, as shapes are fixed, but with no token: they add nothing
        # to the cache, and what they compute is dropped.
        running = (~state.finished).astype(jnp.int32)
        assert state.cache is not None
        logits, cache = model.extend(last, running, state.cache)
        assert logits is not None
        return advance(dataclasses.replace(state, cache=cache), logits, inputs), done + 1

    return jax.lax.while_loop(goes_on, step, (state, jnp.zeros((), jnp.int32)))[0]


def advance(state: DecodeState, logits: Float[Array, "B V"], inputs: SamplerInputs) -> DecodeState:
    """Choose each running row's next token and add it."""
    excluded = forbidden(state, inputs)
    token = sample(logits, inputs, state.lengths, state.seen, state.counts, excluded)
    return append(state, token, logits)


def append(state: DecodeState, token: Int[Array, "B"], logits: Float[Array, "B V"]) -> DecodeState:
    """Add a token to each running row, and end rows that stop with it, or have got none.

    Args:
        state: the batch.
        token: int32 tokens; those of rows that have ended are not used.
        logits: the model's logits of each token's place, for the log-probabilities.
    """
    running = ~state.finished
    place = jnp.where(running, state.lengths, state.tokens.shape[1])  # out of bounds: dropped
    lengths = state.lengths + running
    stopped = jnp.any(token[:, None] == state.stops, axis=1)
    logprobs = state.logprobs
    if logprobs is not None:
        logprobs = logprobs.record(logits, token, state.lengths, running)
    return dataclasses.replace(
        state,
        tokens=jax.vmap(lambda r, p, t: r.at[p].set(t, mode="drop"))(state.tokens, place, token),
        lengths=lengths,
        finished=state.finished | stopped | (token == NO_TOKEN) | (lengths >= state.limits),
        seen=jax.vmap(lambda row, t, one: row.at[t].max(one))(state.seen, token, running),
        counts=jax.vmap(lambda row, t, one: row.at[t].add(one))(
            state.counts, token, running.astype(jnp.int32)
        ),
        logprobs=logprobs,
    )


@runtime_checkable
class History(Protocol):
    """What has come so far in each row: the fields of `DecodeState` of these names."""

    @property
    def tokens(self) -> Int[Array, "B C"]: ...
    @property
    def prompts(self) -> Int[Array, "B"]: ...
    @property
    def lengths(self) -> Int[Array, "B"]: ...
    @property
    def stops(self) -> Int[Array, "B stops"]: ...


def forbidden(state: History, inputs: SamplerInputs) -> Int[Array, "B n"]:
    """Tokens that may not come next, padded with -1: stops before `min_tokens`, ends of bad words
    whose other tokens are the output's last ones."""
    output = state.lengths - state.prompts
    stops = jnp.where((output < inputs.min_tokens)[:, None], state.stops, -1)
    begins, ends = inputs.bad_words[..., :-1], inputs.bad_words[..., -1]
    width = begins.shape[-1]
    places = state.lengths[:, None] + jnp.arange(-width, 0)
    last = jnp.take_along_axis(state.tokens, jnp.maximum(places, 0), axis=1)
    last = jnp.where(places >= state.prompts[:, None], last, -2)[:, None]
    matches = jnp.all((begins == last) | (begins < 0), axis=-1)
    return jnp.concatenate([stops, jnp.where(matches, ends, -1)], axis=1)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lengths", "finished", "tokens", "logprobs"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Snapshot:
    """What the host reads of a batch: lengths, ended rows, and a window of each row's places."""

    lengths: Leaf
    finished: Leaf
    tokens: Leaf
    logprobs: Logprobs | None


@functools.partial(jax.jit, static_argnames="size")
def snapshot(state: DecodeState, starts: Int[Array, "B"], *, size: int) -> Snapshot:
    """The `size` places of each row from `starts` on."""
    places = starts[:, None] + jnp.arange(size)
    places = jnp.minimum(places, state.tokens.shape[1] - 1)

    def window(array: Array) -> Array:
        index = places.reshape(*places.shape, *[1] * (array.ndim - 2))
        return jnp.take_along_axis(array, index, axis=1)

    # New arrays throughout: the state's own are donated to the next steps.
    lengths, finished = jnp.copy(state.lengths), jnp.copy(state.finished)
    return Snapshot(lengths, finished, window(state.tokens), jax.tree.map(window, state.logprobs))
