"""How the next token is chosen from logits, with each request's own parameters and randomness.

The order is vLLM's: bad words and stops before `min_tokens` are excluded, then logit bias, then
repetition, frequency and presence penalties; the likeliest token if the temperature is 0, otherwise
temperature, min_p, top_k, top_p (each on what the one before left), and a draw.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fusedkv_jax.generation.params import SamplingError, SamplingParams
from fusedkv_jax.sharding import constrain
from fusedkv_jax.trees import Leaf

__all__ = [
    "NO_TOKEN",
    "SamplerInputs",
    "SamplingError",
    "SamplingParams",
    "adjust",
    "choose",
    "sample",
    "scaled",
    "unless_broken",
]

NO_TOKEN = -1  # chosen where no logit is finite, or one is not a number
_FEWEST = 4  # smallest bucket of the lists that a request may bring


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition",
        "frequency",
        "presence",
        "seed",
        "min_tokens",
        "bias_ids",
        "bias",
        "bad_words",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class SamplerInputs:
    """The sampling parameters of a batch as arrays, so that changing them compiles nothing.

    Attributes:
        temperature, top_k, top_p, min_p, repetition, frequency, presence, seed, min_tokens: as in
            `SamplingParams`, one for each row, [B].
        bias_ids, bias: tokens with a bias, padded with -1, [B, n].
        bad_words: tokens of each bad word, right-aligned and padded with -1, [B, words, tokens].
    """

    temperature: Leaf
    top_k: Leaf
    top_p: Leaf
    min_p: Leaf
    repetition: Leaf
    frequency: Leaf
    presence: Leaf
    seed: Leaf
    min_tokens: Leaf
    bias_ids: Leaf
    bias: Leaf
    bad_words: Leaf

    @classmethod
    def create(
        cls,
        params: Sequence[SamplingParams],
        bad_words: Sequence[Sequence[Sequence[int]]] = (),
        least: tuple[int, int, int] = (_FEWEST, _FEWEST, _FEWEST),
    ) -> SamplerInputs:
        """Stack the parameters of a batch.

        Args:
            params: those of each row.
            bad_words: the tokens of each row's bad words; none by default.
            least: room for biases, for bad words and for tokens of a bad word, if no row has more.
        """

        def stack(dtype: type[np.number], values: Iterable[float]) -> Array:
            return jnp.asarray(np.asarray(list(values), dtype))

        ids, bias = _bias_arrays(params, least[0])
        return cls(
            temperature=stack(np.float32, (0 if p.is_greedy else p.temperature for p in params)),
            top_k=stack(np.int32, (max(p.top_k, 0) for p in params)),
            top_p=stack(np.float32, (p.top_p for p in params)),
            min_p=stack(np.float32, (p.min_p for p in params)),
            repetition=stack(np.float32, (p.repetition_penalty for p in params)),
            frequency=stack(np.float32, (p.frequency_penalty for p in params)),
            presence=stack(np.float32, (p.presence_penalty for p in params)),
            seed=stack(
                np.uint32, (secrets.randbits(32) if p.seed is None else p.seed for p in params)
            ),
            min_tokens=stack(np.int32, (p.min_tokens for p in params)),
            bias_ids=jnp.asarray(ids),
            bias=jnp.asarray(bias),
            bad_words=jnp.asarray(_bad_word_array(bad_words or [()] * len(params), *least[1:])),
        )

    def any(self, condition: Callable[[SamplerInputs], Array]) -> Bool[Array, ""]:
        """Whether a condition holds for any row; every device of a mesh knows all rows."""
        return jnp.any(condition(jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), self)))


def bucket(size: int, least: int = _FEWEST) -> int:
    """The power of two that holds `size`, at least `least`."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def _bias_arrays(params: Sequence[SamplingParams], least: int) -> tuple[np.ndarray, np.ndarray]:
    width = bucket(max(len(p.logit_bias) for p in params), least)
    ids = np.full((len(params), width), -1, np.int32)
    bias = np.zeros((len(params), width), np.float32)
    for row, p in enumerate(params):
        for place, (token, value) in enumerate(p.logit_bias):
            ids[row, place], bias[row, place] = token, value
    return ids, bias


def _bad_word_array(
    words: Sequence[Sequence[Sequence[int]]], fewest: int, shortest: int
) -> np.ndarray:
    count = bucket(max(len(row) for row in words), fewest)
    width = bucket(max((len(word) for row in words for word in row), default=0), shortest)
    array = np.full((len(words), count, width), -1, np.int32)
    for row, own in enumerate(words):
        for place, word in enumerate(own):
            array[row, place, width - len(word) :] = word
    return array


def sample(
    logits: Float[Array, "B V"],
    inputs: SamplerInputs,
    positions: Int[Array, "B"],
    seen: Bool[Array, "B V"],
    counts: Int[Array, "B V"] | None = None,
    forbidden: Int[Array, "B n"] | None = None,
) -> Int[Array, "B"]:
    """Choose each row's next token.

    Args:
        logits: float32 logits.
        inputs: the rows' parameters.
        positions: the position that the token will have. It and the seed alone make the random
            key, so a request gives the same tokens at any place of any batch.
        seen: tokens that the row contains, for the repetition penalty.
        counts: how often its output contains each token, for the other penalties; 0 by default.
        forbidden: tokens that may not come, padded with -1; none by default.

    Returns:
        int32 token ids; `NO_TOKEN` in rows with a logit of NaN or +inf, or none that is finite.
    """
    return choose(adjust(logits, inputs, seen, counts, forbidden), inputs, positions)


def choose(
    logits: Float[Array, "B V"], inputs: SamplerInputs, positions: Int[Array, "B"]
) -> Int[Array, "B"]:
    """Each row's next token from what `adjust` gave; arguments and result as for `sample`."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    token = jax.lax.cond(
        inputs.any(lambda of: of.temperature > 0),
        lambda: jnp.where(inputs.temperature > 0, _draw(logits, inputs, positions), greedy),
        lambda: greedy,
    )
    return unless_broken(token, logits, greedy)


def unless_broken(
    token: Int[Array, "B"], logits: Float[Array, "B V"], largest: Int[Array, "B"]
) -> Int[Array, "B"]:
    """The tokens, or `NO_TOKEN` where the largest logit says that the row's are not finite.

    NaN counts as the largest, so one look at each row tells.
    """
    top = jnp.take_along_axis(logits, largest[:, None], axis=1)[:, 0]
    return jnp.where(jnp.isfinite(top), token, NO_TOKEN)


def adjust(
    logits: Float[Array, "B V"],
    inputs: SamplerInputs,
    seen: Bool[Array, "B V"],
    counts: Int[Array, "B V"] | None = None,
    forbidden: Int[Array, "B n"] | None = None,
) -> Float[Array, "B V"]:
    """Logits after exclusions, bias and penalties; arguments as for `sample`."""

    def at(row: Array, ids: Array):  # padding, -1, would count from the end
        return row.at[jnp.where(ids < 0, row.shape[0], ids)]

    if forbidden is not None:
        exclude = jax.vmap(lambda row, ids: at(row, ids).set(-jnp.inf, mode="drop"))
        logits = exclude(logits, forbidden)
    add = jax.vmap(lambda row, ids, bias: at(row, ids).add(bias, mode="drop"))
    logits = add(logits, inputs.bias_ids, inputs.bias)

    def penalize(logits: Array) -> Array:
        penalty = inputs.repetition[:, None]
        scaled = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, scaled, logits)
        if counts is None:
            return logits
        logits = logits - inputs.frequency[:, None] * counts
        return logits - inputs.presence[:, None] * (counts > 0)

    def used(of: SamplerInputs) -> Array:
        return (of.repetition != 1) | (of.frequency != 0) | (of.presence != 0)

    return jax.lax.cond(inputs.any(used), penalize, lambda logits: logits, logits)


def scaled(logits: Float[Array, "B V"], inputs: SamplerInputs) -> Float[Array, "B V"]:
    """What `adjust` gave, divided by the temperature and restricted: tokens are drawn from its
    softmax. Greedy rows take temperature 1 here."""
    temperature = jnp.where(inputs.temperature > 0, inputs.temperature, 1.0)
    logits = logits / temperature[:, None]

    def restricted(of: SamplerInputs) -> Array:
        return (of.top_k > 0) | (of.top_p < 1) | (of.min_p > 0)

    return jax.lax.cond(inputs.any(restricted), restrict, lambda x, _: x, logits, inputs)


def _draw(logits: Array, inputs: SamplerInputs, positions: Array) -> Int[Array, "B"]:
    def draw(seed: Array, position: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), row)

    return jax.vmap(draw)(inputs.seed, positions, scaled(logits, inputs)).astype(jnp.int32)


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
