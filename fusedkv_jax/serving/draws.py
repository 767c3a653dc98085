"""How a step's tokens are drawn: the sampler of generation, for rows that come and go."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fusedkv_jax.generation.logprobs import Logprobs, score
from fusedkv_jax.generation.loop import forbidden
from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.generation.requests import PreparedRequest as Prompt
from fusedkv_jax.generation.sampling import NO_TOKEN, SamplerInputs, adjust, choose
from fusedkv_jax.serving.grammars import Constraint
from fusedkv_jax.serving.request import Request
from fusedkv_jax.serving.stand_ins import put_in

NONE_ALLOWED = -2  # chosen where the model's logits are finite, and all tokens are excluded

# Room for the lists that a request may bring: fixed, or a request would compile.
BIASES, BAD_WORDS, BAD_WORD_TOKENS, STOPS = 128, 32, 8, 16


class TokenDraw(NamedTuple):
    """One token to be drawn.

    Attributes:
        request: what it goes on from.
        prompt: its parameters and stops.
        params: the parameters, with the seed of this output.
        constraint: tells which tokens may come; None for all.
        drafts: tokens that it takes for known, behind those that are.
    """

    request: Request
    prompt: Prompt
    params: SamplingParams
    constraint: Constraint | None = None
    drafts: Sequence[int] = ()

    @property
    def length(self) -> int:
        """Known tokens: its position."""
        return self.request.length + len(self.drafts)

    @property
    def special(self) -> bool:
        """Its logits are changed before anything is drawn."""
        p = self.params
        penalties = p.repetition_penalty != 1 or p.frequency_penalty or p.presence_penalty
        return bool(penalties or p.logit_bias or p.min_tokens or self.prompt.bad_words)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "inputs",
        "tokens",
        "latest",
        "prompts",
        "lengths",
        "stops",
        "masks",
        "special",
        "held",
        "scored",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class Draws:
    """Draws as arrays, padded to M.

    Attributes:
        inputs: sampling parameters.
        tokens: int32 prompt and output, [M, L]; zeros unless `special`.
        latest: int32 tokens that the step before has drawn, for their stand-ins in `tokens`.
        prompts: int32 tokens of the prompt, [M].
        lengths: int32 known tokens, [M]: the position of the token that is drawn.
        stops: int32 tokens that end a row, padded with -1, [M, n].
        masks: a bit for each token, 1 where it may come, int32 [M, words].
        special: logits of some row are changed.
        held: some row's mask has a 0.
        scored: some row wants log-probabilities.
    """

    inputs: Any
    tokens: Any
    latest: Any
    prompts: Any
    lengths: Any
    stops: Any
    masks: Any
    special: Bool[Array, ""] | np.bool_
    held: Bool[Array, ""] | np.bool_
    scored: Bool[Array, ""] | np.bool_


def check_lists(prompt: Prompt) -> None:
    """Raises ValueError where a request brings more than there is room for."""
    longest = max((len(word) for word in prompt.bad_words), default=0)
    for name, size, most in (
        ("logit_bias", len(prompt.params.logit_bias), BIASES),
        (
            "bad_words (each as it begins a text and after a space)",
            len(prompt.bad_words),
            BAD_WORDS,
        ),
        ("a bad word's tokens", longest, BAD_WORD_TOKENS),
        ("stop_token_ids and the end-of-text token", len(prompt.stops), STOPS),
    ):
        if size > most:
            raise ValueError(f"{name}: {size}; the engine has room for {most}")


class DrawArrays:
    """Makes `Draws`; parameters of rows that stay are not sent again.

    Args:
        max_model_len: tokens that a request can come to, L.
        words: 32-bit words of a mask.
    """

    def __init__(self, max_model_len: int, words: int):
        self._length, self._words = max_model_len, words
        self._known: dict[int, tuple[list[SamplingParams], SamplerInputs, jax.Array]] = {}
        self._none: dict[tuple[int, int, int], jax.Array] = {}

    def make(self, draws: Sequence[TokenDraw], size: int, latest: Int[Array, "room"]) -> Draws:
        """`draws`, padded to `size`, behind a step that has drawn the tokens `latest`."""
        inputs, stops = self._inputs(draws, size)
        lengths, prompts = np.zeros(size, np.int32), np.zeros(size, np.int32)
        lengths[: len(draws)] = [d.length for d in draws]
        prompts[: len(draws)] = [len(d.request.prompt) for d in draws]
        special = any(d.special for d in draws)
        scored = any(d.params.logprobs is not None for d in draws)
        held = any(d.constraint is not None for d in draws)
        tokens = self._tokens(draws, size) if special else self._all(0, size, self._length)
        masks = self._masks(draws, size) if held else self._all(-1, size, self._words)
        flags = [np.bool_(flag) for flag in (special, held, scored)]
        return Draws(inputs, tokens, latest, prompts, lengths, stops, masks, *flags)

    def _inputs(self, draws: Sequence[TokenDraw], size: int) -> tuple[SamplerInputs, jax.Array]:
        params = [d.params for d in draws]
        if size in self._known:
            before, inputs, stops = self._known[size]
            if len(before) == len(params) and all(
                a is b for a, b in zip(before, params, strict=True)
            ):
                return inputs, stops
        padding = size - len(draws)
        greedy = SamplingParams(temperature=0.0, seed=0)
        words = [*(d.prompt.bad_words for d in draws), *[()] * padding]
        room = BIASES, BAD_WORDS, BAD_WORD_TOKENS
        inputs = SamplerInputs.create([*params, *[greedy] * padding], words, room)
        stops = np.full((size, STOPS), -1, np.int32)
        for row, draw in enumerate(draws):
            stops[row, : len(draw.prompt.stops)] = draw.prompt.stops
        stops = jnp.asarray(stops)
        self._known[size] = params, inputs, stops
        return inputs, stops

    def _tokens(self, draws: Sequence[TokenDraw], size: int) -> np.ndarray:
        tokens = np.zeros((size, self._length), np.int32)
        for row, draw in enumerate(draws):
            prompt = len(draw.request.prompt)
            tokens[row, :prompt] = draw.request.prompt
            tokens[row, prompt : draw.length] = [*draw.request.outputs, *draw.drafts]
        return tokens

    def _masks(self, draws: Sequence[TokenDraw], size: int) -> np.ndarray:
        masks = np.full((size, self._words), -1, np.int32)
        for row, draw in enumerate(draws):
            if draw.constraint is not None:
                masks[row] = draw.constraint.mask(draw.drafts)
        return masks

    def _all(self, value: int, rows: int, columns: int) -> jax.Array:
        """An array of one value, which stays on the device."""
        key = value, rows, columns
        if key not in self._none:
            self._none[key] = jnp.asarray(np.full((rows, columns), value, np.int32))
        return self._none[key]


def draw_tokens(
    logits: Float[Array, "M V"], draws: Draws, k: int
) -> tuple[Int[Array, "M"], Logprobs]:
    """Tokens, and log-probabilities of them and of the likeliest k; zeros if nobody wants any.

    A token is `NO_TOKEN` where logits are not finite, `NONE_ALLOWED` where all are excluded.
    """
    changed = jax.lax.cond(draws.special, _changed, lambda logits, _: logits, logits, draws)
    changed = jax.lax.cond(draws.held, _allowed, lambda logits, _: logits, changed, draws.masks)
    token = choose(changed, draws.inputs, draws.lengths)
    finite = jnp.isfinite(jnp.max(logits, axis=1))  # NaN counts as the largest
    token = jnp.where((token == NO_TOKEN) & finite, NONE_ALLOWED, token)
    empty = jax.tree.map(lambda x: x[:, 0], Logprobs.empty(logits.shape[0], 1, k))
    return token, jax.lax.cond(draws.scored, lambda: score(logits, token, k), lambda: empty)


def _allowed(logits: Float[Array, "M V"], masks: Int[Array, "M words"]) -> Float[Array, "M V"]:
    """Logits of the tokens whose bit is set; -inf for the others."""
    bits = (masks[:, :, None] >> jnp.arange(32)) & 1
    allowed = bits.reshape(masks.shape[0], -1)[:, : logits.shape[1]]
    return jnp.where(allowed == 1, logits, -jnp.inf)


def _changed(logits: Array, draws: Draws) -> Array:
    """Logits after exclusions, bias and penalties."""
    draws = dataclasses.replace(draws, tokens=put_in(draws.tokens, draws.latest))
    rows = jnp.arange(logits.shape[0])[:, None]
    places, beyond = jnp.arange(draws.tokens.shape[1]), logits.shape[1]
    known = places < draws.lengths[:, None]
    seen = jnp.zeros(logits.shape, bool)
    seen = seen.at[rows, jnp.where(known, draws.tokens, beyond)].set(True, mode="drop")
    output = known & (places >= draws.prompts[:, None])
    counts = jnp.zeros(logits.shape, jnp.int32)
    counts = counts.at[rows, jnp.where(output, draws.tokens, beyond)].add(1, mode="drop")
    return adjust(logits, draws.inputs, seen, counts, forbidden(draws, draws.inputs))
