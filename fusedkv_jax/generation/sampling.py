"""How the next token is chosen from logits, with each request's own parameters and randomness.

Names and order are vLLM's: repetition penalty, then greedy if the temperature is 0; otherwise
temperature, min_p, top_k, top_p (each on what the one before left), and a draw.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class SamplingError(ValueError):
    """A sampling parameter out of its bounds; the message names it, its value and the bounds."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded.

    Attributes:
        temperature: 0 is greedy; higher is more random.
        top_k: draw from the k likeliest tokens; 0 or -1 for all.
        top_p: draw from the smallest set of likeliest tokens that holds this probability.
        min_p: drop tokens less likely than this fraction of the likeliest one's probability.
        repetition_penalty: divide positive and multiply negative logits of tokens that the prompt
            or output contains (CTRL, arXiv 1909.05858); 1 for none.
        seed: makes the request reproducible, wherever it stands in a batch; None draws one.
        max_tokens: number of tokens to generate at most.
        stop_token_ids: tokens that end the output; they stay in it.
        ignore_eos: the end-of-text token does not end the output.

    Raises:
        SamplingError: a value is out of bounds.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = field(default=())
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _require("temperature", self.temperature, 0 <= self.temperature < np.inf, "0 or more")
        _require("top_k", self.top_k, self.top_k >= -1, "-1 or 0 (all), or a count")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1")
        penalty = self.repetition_penalty
        _require("repetition_penalty", penalty, 0 < penalty < np.inf, "above 0")
        _require("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        if self.seed is not None:
            _require("seed", self.seed, 0 <= self.seed < 2**32, "0 to 2**32 - 1, or None")


def _require(name: str, value: object, holds: bool, bounds: str) -> None:
    if not holds:
        raise SamplingError(f"{name}={value!r}; use {bounds}")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "min_p", "penalty", "seed"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SamplerInputs:
    """The sampling parameters of a batch as arrays [B], so that changing them compiles nothing."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    penalty: Any
    seed: Any

    @classmethod
    def create(cls, params: Sequence[SamplingParams]) -> SamplerInputs:
        """Stack the parameters of a batch."""

        def stack(dtype, values):
            return jnp.asarray(np.asarray(list(values), dtype))

        return cls(
            temperature=stack(np.float32, (p.temperature for p in params)),
            top_k=stack(np.int32, (max(p.top_k, 0) for p in params)),
            top_p=stack(np.float32, (p.top_p for p in params)),
            min_p=stack(np.float32, (p.min_p for p in params)),
            penalty=stack(np.float32, (p.repetition_penalty for p in params)),
            seed=stack(
                np.uint32, (secrets.randbits(32) if p.seed is None else p.seed for p in params)
            ),
        )


def sample(
    logits: Float[Array, "B V"],
    inputs: SamplerInputs,
    positions: Int[Array, "B"],
    seen: Bool[Array, "B V"],
) -> Int[Array, "B"]:
    """Choose each row's next token.

    Args:
        logits: float32 logits.
        inputs: the rows' parameters.
        positions: the position that the token will have. It and the seed alone make the random
            key, so a request gives the same tokens at any place of any batch.
        seen: tokens that the row contains, for the repetition penalty.

    Returns:
        int32 token ids.
    """
    logits = jax.lax.cond(jnp.any(inputs.penalty != 1), _penalize, _keep, logits, inputs, seen)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.lax.cond(
        jnp.any(inputs.temperature > 0),
        lambda: jnp.where(inputs.temperature > 0, _draw(logits, inputs, positions), greedy),
        lambda: greedy,
    )


def _keep(logits: Array, inputs: SamplerInputs, seen: Array) -> Array:
    return logits


def _penalize(logits: Array, inputs: SamplerInputs, seen: Array) -> Array:
    penalty = inputs.penalty[:, None]
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, penalized, logits)


def _draw(logits: Array, inputs: SamplerInputs, positions: Array) -> Int[Array, "B"]:
    # Rows that are greedy get temperature 1 here; their draw is not used.
    temperature = jnp.where(inputs.temperature > 0, inputs.temperature, 1.0)
    scaled = logits / temperature[:, None]
    restricted = (inputs.top_k > 0) | (inputs.top_p < 1) | (inputs.min_p > 0)
    scaled = jax.lax.cond(jnp.any(restricted), restrict, lambda x, _: x, scaled, inputs)

    def draw(seed, position, row):
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), row)

    return jax.vmap(draw)(inputs.seed, positions, scaled).astype(jnp.int32)


def restrict(logits: Float[Array, "B V"], inputs: SamplerInputs) -> Float[Array, "B V"]:
    """Logits with -inf for tokens that min_p, then top_k, then top_p exclude.

    Equal logits rank by token id. At least the likeliest token always stays.
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    likely = ranked >= ranked[:, :1] + jnp.log(inputs.min_p)[:, None]  # p >= min_p * max p
    within = (rank < inputs.top_k[:, None]) | (inputs.top_k[:, None] == 0)
    keep = (likely & within) | (rank == 0)
    probabilities = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    keep &= (before < inputs.top_p[:, None]) | (inputs.top_p[:, None] >= 1)
    keep |= rank == 0
    place = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(keep, place, axis=-1), logits, -jnp.inf)
