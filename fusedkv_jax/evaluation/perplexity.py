"""Perplexity of long texts read through a cache: by position, and by the cache's storage type."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from fusedkv_jax.cache import KVCache
from fusedkv_jax.model import Decoder, fold_fusion
from fusedkv_jax.model.checks import check_integers, check_shape
from fusedkv_jax.training.loss import sum_cross_entropy
from fusedkv_jax.validation import check_count


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Of the targets at positions `start` to `stop` (exclusive) of all texts.

    Attributes:
      start, stop: the positions.
      loss_sum: negative log-likelihood in nats, summed.
      num_tokens: targets counted.
    """

    start: int
    stop: int
    loss_sum: float
    num_tokens: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return self.loss_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(min(self.loss, 700.0))


def at_length(
    model: Decoder,
    texts: np.ndarray,
    *,
    chunk: int = 256,
    cache_dtype: str | None = None,
    mask: np.ndarray | None = None,
) -> list[Perplexity]:
    """Read texts chunk by chunk through a cache; the loss of every chunk of positions.

    All tokens are read back from the cache, those of the chunk itself too, so the effect of a
    storage type shows in full.

    Args:
      model: the model.
      texts: [B, T + 1] int32 token ids, each row one text from its beginning.
      chunk: positions that go through the model together, and of one entry of the result.
      cache_dtype: storage type of the cache, by default the model's activation type.
      mask: [B, T] nonzero where the target, texts[:, 1:], counts; default all.

    Returns:
      One entry for each chunk with targets that count, in order.

    Raises:
      ValueError: texts longer than the model's context, none that count, or a mask of another
        shape.
    """
    model = fold_fusion(model)
    check_integers("texts", texts, "B T+1")
    check_count("chunk", chunk)
    size, length = texts.shape[0], texts.shape[1] - 1
    if not 1 <= length <= model.config.max_length:
        raise ValueError(
            f"the texts have {length} positions; use 1 to the model's max_length="
            f"{model.config.max_length}"
        )
    if mask is not None:
        check_shape("mask", mask, (size, length))
    weights = np.ones((size, length), bool) if mask is None else np.asarray(mask) != 0
    capacity = -(-length // chunk) * chunk
    cache = KVCache.create(model.config, batch_size=size, max_length=capacity, dtype=cache_dtype)
    graph, params = nnx.split(model)
    found = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        columns = ((0, 0), (0, chunk - (stop - start)))
        tokens = np.pad(texts[:, start:stop], columns)
        targets = np.pad(texts[:, start + 1 : stop + 1], columns)
        counted = np.pad(weights[:, start:stop], columns)
        arrays = map(jnp.asarray, (tokens, targets, counted, np.full(size, stop - start)))
        loss, count, cache = _chunk(graph, params, _Texts(*arrays), cache)
        if count:
            found.append(Perplexity(start, stop, float(loss), int(count)))
    if not found:
        raise ValueError("mask selects no target; there is nothing to measure")
    return found


def total(parts: Sequence[Perplexity]) -> Perplexity:
    """All parts together."""
    return Perplexity(
        min(part.start for part in parts),
        max(part.stop for part in parts),
        math.fsum(part.loss_sum for part in parts),
        sum(part.num_tokens for part in parts),
    )


class _Texts(NamedTuple):
    """A chunk of positions: tokens, targets and which count [B, T], and tokens of each row [B]."""

    tokens: Array
    targets: Array
    counted: Array
    count: Array


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def _chunk(
    graph: nnx.GraphDef[Decoder], params: nnx.State, texts: _Texts, cache: KVCache
) -> tuple[Array, Array, KVCache]:
    model = nnx.merge(graph, params)
    logits, cache = model.extend(texts.tokens, texts.count.astype(jnp.int32), cache, rows="all")
    assert logits is not None
    return *sum_cross_entropy(logits, texts.targets, texts.counted), cache
