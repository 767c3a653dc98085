"""How near the predictions with a compressed cache are to those with the whole one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from fusedkv_jax.model.checks import check_shape


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Means over predictions of the next token.

    Attributes:
      kl: Kullback-Leibler divergence of the other distribution from the reference, in nats:
        sum over tokens of p_reference * log(p_reference / p_other).
      top1: share of the places where both have the same likeliest token.
      places: number of places.
    """

    kl: float
    top1: float
    places: int


def agreement(
    reference: Float[Array, "*B V"], other: Float[Array, "*B V"], mask: ArrayLike | None = None
) -> Agreement:
    """Compare the logits of two runs over the same text.

    Args:
      reference: logits of the uncompressed model.
      other: logits to compare with them.
      mask: [*B], nonzero at the places that count; default all.

    Raises:
      ValueError: no place counts, or the shapes do not fit together.
    """
    check_shape("other", other, reference.shape)
    if mask is not None:
        check_shape("mask", mask, reference.shape[:-1])
    chosen = jnp.ones(reference.shape[:-1], bool) if mask is None else jnp.asarray(mask) != 0
    places = int(chosen.sum())
    if not places:
        raise ValueError("mask selects no place; nothing can be compared")
    kl, same = _compare(reference, other, chosen)
    return Agreement(float(kl) / places, float(same) / places, places)


@jax.jit
def _compare(reference: Array, other: Array, chosen: Array) -> tuple[Array, Array]:
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (reference, other))
    # A token that the reference excludes adds nothing, whatever the other run thinks of it.
    terms = jnp.where(p == -jnp.inf, 0.0, jnp.exp(p) * (p - q))
    same = jnp.argmax(p, -1) == jnp.argmax(q, -1)
    return jnp.where(chosen, terms.sum(-1), 0.0).sum(), (same & chosen).sum()


def exact_matches(
    logits: Float[Array, "B C V"], tokens: ArrayLike, answers: ArrayLike
) -> tuple[int, int]:
    """Answers whose every token is the likeliest one.

    Each token is predicted after the right ones before it, so for the first answer this is what
    greedy decoding gives, and for a later one what it gives after right answers.

    Args:
      logits: the prediction of each token.
      tokens: [B, C] the right tokens.
      answers: [B, C] 0 where no answer is, else the number of the answer within its row.

    Returns:
      (answers that are right, answers).

    Raises:
      ValueError: the shapes do not fit together.
    """
    check_shape("tokens", tokens, logits.shape[:-1])
    check_shape("answers", answers, logits.shape[:-1])
    right = np.asarray(jnp.argmax(logits, -1)) == np.asarray(tokens)
    answers = np.asarray(answers)
    verdicts = [
        bool(right[row][answers[row] == number].all())
        for row in range(len(answers))
        for number in np.unique(answers[row][answers[row] > 0])
    ]
    return sum(verdicts), len(verdicts)


def losses(logits: Float[Array, "B C V"], tokens: ArrayLike, mask: ArrayLike) -> tuple[float, int]:
    """(negative log-likelihood of the tokens where mask is nonzero, summed in nats; how many).

    Args:
      logits: the prediction of each token.
      tokens, mask: [B, C].

    Raises:
      ValueError: the shapes do not fit together.
    """
    check_shape("tokens", tokens, logits.shape[:-1])
    check_shape("mask", mask, logits.shape[:-1])
    chosen = jnp.asarray(mask) != 0
    each = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.asarray(tokens)
    )
    return float(jnp.where(chosen, each, 0.0).sum()), int(chosen.sum())
