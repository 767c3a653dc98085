"""Stand-ins: numbers below 0 for tokens that a step draws which the device still computes.

The host plans the next step with them, and the device puts in what it has drawn. -1 is the token of
the first row that the step before has sampled, -2 that of the second, and so on.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int


def stand_in(row: int) -> int:
    """What stands for the token of a sampled row."""
    return -1 - row


def put_in(tokens: Int[Array, "..."], latest: Int[Array, "M"]) -> Int[Array, "..."]:
    """Tokens with those that the step before has drawn, `latest`, for their stand-ins.

    Where nothing could be drawn it is some token: the request ends when the host has seen that.
    """
    tokens = jnp.asarray(tokens)
    drawn = jnp.take(latest, -1 - tokens, mode="clip")
    return jnp.where(tokens < 0, jnp.maximum(drawn, 0), tokens)
