"""Log-probabilities of tokens: recorded while decoding, or scored over a prompt.

They are the model's own: of the logits before bias, penalties and temperature, as vLLM's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fusedkv_jax.generation.results import Logprob
from fusedkv_jax.trees import Leaf


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["chosen", "ranks", "top", "top_ids"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of tokens at many places.

    Attributes:
        chosen: float32 log-probability of the token that stands at each place, [..., S].
        ranks: its int32 rank, 1 for the likeliest, [..., S].
        top: float32 log-probabilities of the likeliest k tokens, [..., S, k].
        top_ids: their int32 ids, [..., S, k].
    """

    chosen: Leaf
    ranks: Leaf
    top: Leaf
    top_ids: Leaf

    @classmethod
    def empty(cls, rows: int, places: int, k: int) -> Logprobs:
        """Arrays to record into."""
        shape = (rows, places)
        return cls(
            jnp.zeros(shape, jnp.float32),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros((*shape, k), jnp.float32),
            jnp.zeros((*shape, k), jnp.int32),
        )

    @property
    def k(self) -> int:
        """Number of likeliest tokens that are kept."""
        return self.top.shape[-1]

    def record(
        self,
        logits: Float[Array, "B V"],
        token: Int[Array, "B"],
        places: Int[Array, "B"],
        running: Bool[Array, "B"],
    ) -> Logprobs:
        """Put down a token that was chosen at `places`, in running rows."""
        rows = jnp.arange(token.shape[0])
        places = jnp.where(running, places, self.chosen.shape[1])  # out of bounds: dropped
        return jax.tree.map(
            lambda kept, new: kept.at[rows, places].set(new, mode="drop"),
            self,
            score(logits, token, self.k),
        )

    def dictionaries(
        self,
        tokens: Sequence[int],
        count: int | None,
        decode: Callable[[Sequence[int]], str] | None,
    ) -> list[dict[int, Logprob]]:
        """The places of one row (arrays [S], [S, k]) as vLLM gives them: the token that stands
        there and the likeliest `count` ones, all k if that is -1."""
        found = []
        count = self.k if count is None or count < 0 else count
        for place, token in enumerate(tokens):
            ids = np.asarray(self.top_ids[place][:count]).tolist()
            values = np.asarray(self.top[place][:count]).tolist()
            entries = {token: (float(self.chosen[place]), int(self.ranks[place]))}
            entries |= {t: (v, r) for r, (t, v) in enumerate(zip(ids, values, strict=True), 1)}
            found.append(
                {t: Logprob(v, r, decode([t]) if decode else None) for t, (v, r) in entries.items()}
            )
        return found


def score(logits: Float[Array, "*S V"], tokens: Int[Array, "*S"], k: int) -> Logprobs:
    """Log-probabilities of given tokens and of the likeliest k."""
    values = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(values, tokens[..., None], axis=-1)
    top, ids = jax.lax.top_k(values, k)
    ranks = 1 + jnp.sum(values > chosen, axis=-1, dtype=jnp.int32)
    return Logprobs(chosen[..., 0], ranks, top, ids.astype(jnp.int32))
