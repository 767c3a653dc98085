"""What can be told of tokens and caches before a program runs.

Inside `jax.jit` values are not known: what is refused here gives NaN logits there, for as long as
the row's cache is used (`KVCache.overflowed`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array

from fusedkv_jax.cache import KVCache
from fusedkv_jax.config import ModelConfig


def known(x: ArrayLike) -> np.ndarray | None:
    """The values of an array, or None while tracing and for what other processes hold."""
    if isinstance(x, Tracer):
        return None
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    return np.asarray(x)


def check_integers(name: str, given: object, axes: str) -> None:
    """Raises ValueError unless it is an array of integers with so many axes, such as "B T"."""
    dtype = getattr(given, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        what = type(given).__name__ if dtype is None else dtype
        raise ValueError(f"{name} is {what}; use an array of int32")
    shape = getattr(given, "shape", ())
    if len(shape) != len(axes.split()):
        raise ValueError(f"{name} has shape {shape}; use [{axes.replace(' ', ', ')}]")


def check_shape(name: str, given: ArrayLike, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless an array has a shape; one that would broadcast to it has not."""
    if np.shape(given) != shape:
        raise ValueError(f"{name} has shape {np.shape(given)}; use {shape}")


def check_tokens(tokens: ArrayLike, vocab_size: int, present: np.ndarray | None = None) -> None:
    """Raises ValueError for a token id outside the vocabulary.

    Args:
        tokens: int32 ids of any shape.
        vocab_size: V.
        present: places that are no padding; all by default.
    """
    values = known(tokens)
    if values is None:
        return
    wrong = (values < 0) | (values >= vocab_size)
    wrong &= True if present is None else present
    if wrong.any():
        raise ValueError(
            f"tokens holds id {values[wrong][0]}; use ids from 0 to vocab_size - 1 ="
            f" {vocab_size - 1}"
        )


def check_room(config: ModelConfig, tokens: Array, lengths: Array, cache: KVCache) -> None:
    """Raises ValueError where a model cannot put rows of new tokens into a cache.

    Args:
        config: of the model.
        tokens: int32 [B, T].
        lengths: int32 tokens of each row [B].
        cache: the cache; where it can be told, what its rows hold already is counted.
    """
    rows, width = tokens.shape
    cache.check(config, rows)
    if lengths.shape != (rows,):
        raise ValueError(f"lengths has shape {lengths.shape}; use ({rows},), one for each row")
    counts, held, capacity = known(lengths), known(cache.lengths), cache.capacity
    if counts is not None:
        outside = (counts < 0) | (counts > width)
        if outside.any():
            raise ValueError(
                f"lengths holds {counts[outside][0]}; use 0 to {width}, the columns of tokens"
            )
        check_tokens(tokens, config.vocab_size, np.arange(width) < counts[:, None])
    if counts is not None and held is not None:
        full = np.asarray(cache.overflows(jnp.asarray(held + counts, jnp.int32)))
        if full.any():
            row = int(np.argmax(full))
            raise ValueError(
                f"row {row} holds {held[row]} tokens and is given {counts[row]} more, but the cache"
                f" has room for {capacity}; create it with a larger max_length"
            )
