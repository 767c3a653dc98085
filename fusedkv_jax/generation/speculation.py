"""Self-speculative decoding: a model's lower layers draft, its upper layers verify.

A round drafts up to k tokens with the layers below an early exit, then runs the layers above for
all of them at once and keeps the longest prefix that the whole model agrees with, and one token
more. The exit of `prefill_depth` is special: on FusedKV and its kin the lower half is all that
caches, so what verifies has nothing to roll back. Greedy outputs are those of plain decoding. Where
tokens are drawn, the drafted token d is accepted with probability min(1, p(d) / q(d)) and otherwise
replaced by a draw from max(p - q, 0), so outputs have the distribution p (arXiv 2211.17192).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.generation import loop
from fusedkv_jax.generation.loop import DecodeState
from fusedkv_jax.generation.sampling import SamplerInputs, adjust, scaled, unless_broken
from fusedkv_jax.model import Decoder
from fusedkv_jax.model.early_exit import (
    Draft,
    begin_draft,
    exit_logits,
    extend_draft,
    verify_draft,
)
from fusedkv_jax.model.transform import split_at
from fusedkv_jax.validation import validate

_DRAFT, _ACCEPT, _REPLACE = range(3)  # purposes of the draws of one position


class Acceptance(NamedTuple):
    """How drafts fared.

    Attributes:
        drafted: tokens that were drafted, int32 [B].
        accepted: those of them that are in the output, int32 [B].
        rounds: rounds of a draft and its verification, int32 [B].
    """

    drafted: Int[Array, "B"]
    accepted: Int[Array, "B"]
    rounds: Int[Array, "B"]


@dataclass(frozen=True, kw_only=True)
class SelfSpeculation:
    """A model that drafts for itself (LayerSkip, arXiv 2404.16710), for `generate(speculation=)`.

    It pays on models that were trained with the early-exit loss (`EarlyExitConfig`).

    Attributes:
        exit_layer: number of lower layers that draft; by default the layout's `prefill_depth`.
        draft_tokens: tokens of a draft, at most; 0 is plain decoding.
        adaptive: each row ends its draft where the chance that all of it is right, the product of
            the draft's own largest probabilities, falls below the share exit_layer / num_layers of
            a step that a further token would cost.

    Raises:
        ValueError: a value is out of bounds.
    """

    exit_layer: int | None = None
    draft_tokens: int = 4
    adaptive: bool = False

    def __post_init__(self) -> None:
        validate(self, ValueError)
        if self.exit_layer is not None and self.exit_layer < 1:
            raise ValueError(f"exit_layer={self.exit_layer}; use 1 or more, or None")
        if self.draft_tokens < 0:
            raise ValueError(f"draft_tokens={self.draft_tokens}; use 0 or more")

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError where a model cannot draft for itself in this way."""
        layout = config.kv_layout
        exit_layer = self.layers(config)
        if exit_layer not in layout.exits:
            known = ", ".join(map(str, layout.exits)) or "none in this layout"
            reason = (
                "all layers cache something, so there is no default"
                if self.exit_layer is None
                else "layers below it would read layers above it, or it leaves no layer to verify"
            )
            raise ValueError(f"exit_layer={self.exit_layer}: {reason}; exits are {known}")
        if self.draft_tokens >= config.max_length:
            raise ValueError(
                f"draft_tokens={self.draft_tokens}; use less than the model's"
                f" max_length={config.max_length}"
            )
        if layout.is_cyclic and self.draft_tokens >= sum(layout.passes):
            raise ValueError(
                f"draft_tokens={self.draft_tokens} needs as many passes and one more of this cyclic"
                f" layout, which has {sum(layout.passes)}; use fewer, or raise its passes"
            )

    def layers(self, config: ModelConfig) -> int:
        """Number of lower layers that draft."""
        return config.kv_layout.prefill_depth if self.exit_layer is None else self.exit_layer

    def decode(
        self,
        graph: nnx.GraphDef[Decoder],
        params: PyTree,
        state: DecodeState,
        inputs: SamplerInputs,
        steps: Int[Array, ""] | int | None = None,
    ) -> DecodeState:
        """As `loop.decode`; a step is a round and adds 1 to `draft_tokens` + 1 tokens a row.

        `state.extra` counts what was drafted and accepted, as an `Acceptance`.
        """
        if not self.draft_tokens:
            return loop.decode(graph, params, state, inputs, steps)
        if state.extra is None:
            none = (jnp.zeros_like(state.lengths) for _ in Acceptance._fields)
            state = dataclasses.replace(state, extra=Acceptance(*none))
        return _decode(self, graph, params, state, inputs, steps)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="state")
def _decode(
    speculation: SelfSpeculation,
    graph: nnx.GraphDef[Decoder],
    params: PyTree,
    state: DecodeState,
    inputs: SamplerInputs,
    steps: Int[Array, ""] | int | None,
) -> DecodeState:
    model = nnx.merge(graph, params)
    drafter = _Drafter(speculation, split_at(model, speculation.layers(model.config)))

    def goes_on(carry: tuple[DecodeState, Array]) -> Bool[Array, ""]:
        state, done = carry
        more = True if steps is None else done < steps
        return more & ~jnp.all(state.finished)

    def one_round(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, done = carry
        return _round(drafter, state, inputs), done + 1

    return jax.lax.while_loop(goes_on, one_round, (state, jnp.zeros((), jnp.int32)))[0]


class _Drafting(NamedTuple):
    """A round's draft while it grows; k is the most tokens that it can have.

    Attributes:
        draft: the last token and the drafted ones, as far as they have passed the lower layers.
        token: what passes them next, [B].
        running: rows that have such a token, [B].
        place: how many tokens have passed.
        count: drafted tokens of each row, [B].
        tokens: the drafted tokens, [B, k].
        q: the distributions that they were drawn from, [B, k, V].
        chance: estimated probability that all of them are right, [B].
    """

    draft: Draft
    token: Int[Array, "B"]
    running: Bool[Array, "B"]
    place: Int[Array, ""]
    count: Int[Array, "B"]
    tokens: Int[Array, "B k"]
    q: Float[Array, "B k V"]
    chance: Float[Array, "B"]


class _Drafter(NamedTuple):
    """A model that drafts for itself, its layers grouped so that it can stop at the exit."""

    speculation: SelfSpeculation
    model: Decoder

    @property
    def exit_layer(self) -> int:
        return self.speculation.layers(self.model.config)


def _round(drafter: _Drafter, state: DecodeState, inputs: SamplerInputs) -> DecodeState:
    assert state.cache is not None
    running = ~state.finished
    drafted = _draft(drafter, state, inputs)
    count = jnp.where(running, drafted.count + 1, 0)
    model, exit_layer = drafter.model, drafter.exit_layer
    logits, keep = verify_draft(model, state.cache, drafted.draft, count, exit_layer)
    before, stats = state.lengths, state.extra
    state = dataclasses.replace(state, cache=None)
    state, accepted = _accept(state, drafted, logits, inputs)
    stats = Acceptance(
        stats.drafted + jnp.where(running, drafted.count, 0),
        stats.accepted + accepted,
        stats.rounds + running,
    )
    return dataclasses.replace(state, cache=keep(state.lengths - before), extra=stats)


def _draft(drafter: _Drafter, state: DecodeState, inputs: SamplerInputs) -> _Drafting:
    assert state.cache is not None
    (speculation, model), exit_layer = drafter, drafter.exit_layer
    size, vocab_size = state.seen.shape
    k = speculation.draft_tokens
    # The last of the tokens that a row may still get needs no draft: verification gives it.
    room = jnp.minimum(state.limits - state.lengths - 1, k)
    worth = exit_layer / model.config.num_layers if speculation.adaptive else 0.0

    def step(now: _Drafting) -> _Drafting:
        x, draft = extend_draft(model, now.draft, now.token, now.running, now.place, exit_layer)
        running = now.running & (now.place < room) & (now.chance >= worth)

        def choose() -> tuple[Array, Array, Array]:
            # The context of penalties is that of the round's start: q may be any distribution.
            excluded = loop.forbidden(state, inputs)
            logits = exit_logits(model, x)
            logits = adjust(logits, inputs, state.seen, state.counts, excluded)
            q = _distribution(logits, inputs)
            token = _draw(_DRAFT, q, inputs, state.lengths + now.place)
            sure = jnp.where(inputs.temperature > 0, q.max(-1), jax.nn.softmax(logits).max(-1))
            return token, q, sure

        def nothing() -> tuple[Array, Array, Array]:
            none = jnp.zeros((size, vocab_size), jnp.float32)
            return now.token, none, jnp.ones(size, jnp.float32)

        token, q, sure = jax.lax.cond(jnp.any(running), choose, nothing)
        place = now.place
        return _Drafting(
            draft=draft,
            token=token,
            running=running,
            place=place + 1,
            count=now.count + running,
            tokens=now.tokens.at[:, place].set(token, mode="drop"),
            q=now.q.at[:, place].set(q, mode="drop"),
            chance=now.chance * sure,
        )

    start = _Drafting(
        draft=begin_draft(model, state.cache, k + 1),
        token=jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)[:, 0],
        running=~state.finished,
        place=jnp.zeros((), jnp.int32),
        count=jnp.zeros_like(state.lengths),
        tokens=jnp.zeros((size, k), jnp.int32),
        q=jnp.zeros((size, k, vocab_size), jnp.float32),
        chance=jnp.ones(size, jnp.float32),
    )
    return jax.lax.while_loop(lambda now: jnp.any(now.running), step, start)


_Accepting = tuple[DecodeState, Array, Array, Array]  # place, rows that go on, tokens accepted


def _accept(
    state: DecodeState, drafted: _Drafting, logits: Float[Array, "B T V"], inputs: SamplerInputs
) -> tuple[DecodeState, Int[Array, "B"]]:
    """Append what verification leaves of the drafts, and the token that follows it.

    Token by token, since exclusions and penalties depend on the tokens before.
    """
    last = drafted.tokens.shape[1] - 1

    def goes_on(carry: _Accepting) -> Bool[Array, ""]:
        return jnp.any(carry[2])

    def step(carry: _Accepting) -> _Accepting:
        state, place, going, accepted = carry
        here = jnp.minimum(place, last)
        guess, q = drafted.tokens[:, here], drafted.q[:, here]
        guessed = place < drafted.count
        excluded = loop.forbidden(state, inputs)
        own = logits[:, place]
        adjusted = adjust(own, inputs, state.seen, state.counts, excluded)
        p = _distribution(adjusted, inputs)
        token, right = accept_or_replace(p, q, guess, guessed, inputs, state.lengths)
        token = unless_broken(token, adjusted, jnp.argmax(adjusted, axis=-1))
        # Rows that are through are kept out of `append` as if they had ended.
        added = loop.append(
            dataclasses.replace(state, finished=~going),
            token,
            own,
        )
        finished = jnp.where(going, added.finished, state.finished)
        accepted += going & right
        return (
            dataclasses.replace(added, finished=finished),
            place + 1,
            going & right & ~finished,
            accepted,
        )

    start = (state, jnp.zeros((), jnp.int32), ~state.finished, jnp.zeros_like(state.lengths))
    state, _, _, accepted = jax.lax.while_loop(goes_on, step, start)
    return state, accepted


def accept_or_replace(
    p: Float[Array, "B V"],
    q: Float[Array, "B V"],
    guess: Int[Array, "B"],
    guessed: Bool[Array, "B"],
    inputs: SamplerInputs,
    positions: Int[Array, "B"],
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """A token with distribution p, equal to the draft's where possible.

    Args:
        p: the model's distributions; of greedy rows, all in one token.
        q: the distributions that the guesses were drawn from.
        guess: the drafted tokens.
        guessed: rows that have one.
        inputs: sampling parameters.
        positions: of the tokens.

    Returns:
        Tokens, and whether each is the guess.
    """
    rows = jnp.arange(p.shape[0])
    greedy = jnp.argmax(p, axis=-1).astype(jnp.int32)

    def draw() -> tuple[Array, Array]:
        uniform = jax.vmap(functools.partial(jax.random.uniform, dtype=jnp.float32))(
            _keys(_ACCEPT, inputs, positions)
        )
        right = guessed & (uniform * q[rows, guess] < p[rows, guess])
        rest = jnp.maximum(p - jnp.where(guessed[:, None], q, 0.0), 0.0)
        # p and q that differ by rounding only may leave nothing.
        rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p)
        other = _draw(_REPLACE, rest, inputs, positions)
        drawn = jnp.where(right, guess, other)
        chosen = inputs.temperature > 0
        return jnp.where(chosen, drawn, greedy), jnp.where(
            chosen, right, guessed & (guess == greedy)
        )

    return jax.lax.cond(
        inputs.any(lambda of: of.temperature > 0),
        draw,
        lambda: (greedy, guessed & (guess == greedy)),
    )


def _distribution(adjusted: Float[Array, "B V"], inputs: SamplerInputs) -> Float[Array, "B V"]:
    """What a token is drawn from, given adjusted logits; of greedy rows, all in the likeliest."""
    best = jax.nn.one_hot(jnp.argmax(adjusted, axis=-1), adjusted.shape[-1], dtype=jnp.float32)

    def soft() -> Array:
        drawn = jax.nn.softmax(scaled(adjusted, inputs), axis=-1)
        return jnp.where((inputs.temperature > 0)[:, None], drawn, best)

    return jax.lax.cond(inputs.any(lambda of: of.temperature > 0), soft, lambda: best)


def _draw(
    purpose: int, p: Float[Array, "B V"], inputs: SamplerInputs, positions: Int[Array, "B"]
) -> Int[Array, "B"]:
    """A token of each row from (unnormalized) probabilities."""

    def draw() -> Array:
        keys = _keys(purpose, inputs, positions)
        return jax.vmap(jax.random.categorical)(keys, jnp.log(p)).astype(jnp.int32)

    return jax.lax.cond(
        inputs.any(lambda of: of.temperature > 0),
        draw,
        lambda: jnp.argmax(p, axis=-1).astype(jnp.int32),
    )


def _keys(purpose: int, inputs: SamplerInputs, positions: Int[Array, "B"]) -> Array:
    """Random keys that depend on a request's seed, the position and the purpose alone.

    Whether a position is reached depends on draws of earlier positions only, so its own are fresh.
    """

    def key(seed: Array, position: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), purpose)

    return jax.vmap(key)(inputs.seed, positions)
