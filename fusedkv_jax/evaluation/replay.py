"""Teacher-forced decoding: what a model predicts along a given text, token by token with a cache.

The text is the same for every compressor and storage type, so predictions can be compared place
by place; each token goes through the cache alone, as in generation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache import KVCache
from fusedkv_jax.compression import Compressor
from fusedkv_jax.generation import prefill
from fusedkv_jax.model import Decoder, fold_fusion


@dataclasses.dataclass(frozen=True)
class Split:
    """Texts cut into a prompt and what follows, each padded to the longest.

    Attributes:
      prompts: [B, T] int32, right-padded.
      lengths: [B] int32, tokens in each prompt.
      tokens: [B, C] int32, what follows, right-padded.
      counts: [B] int32, tokens in each of them.
    """

    prompts: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray


def split(tokens: np.ndarray, cut: np.ndarray) -> Split:
    """Cut each row of [B, L] tokens at its own place, `cut` [B].

    Raises:
      ValueError: a cut that leaves a part empty.
    """
    length = tokens.shape[1]
    wrong = next((int(place) for place in cut if not 0 < place < length), None)
    if wrong is not None:
        raise ValueError(f"cut={wrong} leaves a part empty; rows have {length} tokens")
    rest = length - cut
    prompts = np.zeros((len(tokens), int(cut.max())), np.int32)
    after = np.zeros((len(tokens), int(rest.max())), np.int32)
    for row, place in enumerate(cut):
        prompts[row, :place] = tokens[row, :place]
        after[row, : length - place] = tokens[row, place:]
    return Split(prompts, cut.astype(np.int32), after, rest.astype(np.int32))


def widen(parts: Split, prompt_width: int, width: int) -> Split:
    """The same texts, padded to `prompt_width` and `width` tokens: equal shapes compile once."""

    def pad(array: np.ndarray, size: int) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, size - array.shape[1])))

    return Split(
        pad(parts.prompts, prompt_width), parts.lengths, pad(parts.tokens, width), parts.counts
    )


def align(marks: np.ndarray, parts: Split) -> np.ndarray:
    """[B, L] marks of the uncut rows where `parts.tokens` has their tokens, 0 at padding."""
    aligned = np.zeros(parts.tokens.shape, marks.dtype)
    for row, (start, size) in enumerate(zip(parts.lengths, parts.counts, strict=True)):
        aligned[row, :size] = marks[row, start:]
    return aligned


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a model predicted.

    Attributes:
      logits: [B, C, V] float32, of each token of `Split.tokens`.
      cache_bytes: bytes of the arrays that hold the prompts' and the later tokens' cache.
      written: [B, W] int32, what the model writes by itself after the prompts, likeliest tokens.
    """

    logits: Float[Array, "B C V"]
    cache_bytes: int
    written: Int[Array, "B W"]


def replay(
    model: Decoder,
    parts: Split,
    *,
    compression: Compressor | None = None,
    cache_dtype: str | None = None,
    write: int = 0,
) -> Replay:
    """Prefill the prompts, compress, and feed what follows one token at a time.

    Args:
      model: the model.
      parts: prompts and what follows.
      compression: a compressor of `fusedkv_jax.compression`, or None for the whole cache.
      cache_dtype: storage type of the cache, by default the model's activation type.
      write: tokens that the model writes by itself after each prompt, from the same cache.

    Raises:
      ValueError: the text is longer than the model's context, or the compressor or storage type
        cannot serve this model.
    """
    model = fold_fusion(model)
    longest = int((parts.lengths + np.maximum(parts.counts, write)).max())
    if longest > model.config.max_length:
        raise ValueError(
            f"the text has {longest} tokens, more than the model's max_length="
            f"{model.config.max_length}; use shorter examples"
        )
    size, width = parts.prompts.shape
    total = width + max(parts.tokens.shape[1], write)
    cache = KVCache.create(model.config, batch_size=size, max_length=total, dtype=cache_dtype)
    prompts, lengths = jnp.asarray(parts.prompts), jnp.asarray(parts.lengths)
    first, cache = prefill(model, prompts, lengths, cache, compression=compression)
    held = int(cache.nbytes)
    logits = _follow(
        *nnx.split(model), first, cache, jnp.asarray(parts.tokens), jnp.asarray(parts.counts)
    )
    written = jnp.zeros((size, 0), jnp.int32)
    if write:
        written = _write(*nnx.split(model), first, cache, write)
    return Replay(logits, held, written)


@functools.partial(jax.jit, static_argnums=0)
def _follow(
    graph: nnx.GraphDef[Decoder],
    params: nnx.State,
    first: Array,
    cache: KVCache,
    tokens: Array,
    counts: Array,
) -> Array:
    model = nnx.merge(graph, params)

    def step(cache: KVCache, place: Array) -> tuple[KVCache, Array]:
        token = jax.lax.dynamic_slice_in_dim(tokens, place, 1, axis=1)
        logits, cache = model.extend(token, (place < counts).astype(jnp.int32), cache)
        assert logits is not None
        return cache, logits

    _, later = jax.lax.scan(step, cache, jnp.arange(tokens.shape[1] - 1))
    return jnp.concatenate([first[:, None], jnp.swapaxes(later, 0, 1)], axis=1)  # [B, C, V]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _write(
    graph: nnx.GraphDef[Decoder], params: nnx.State, first: Array, cache: KVCache, count: int
) -> Array:
    model = nnx.merge(graph, params)
    ones = jnp.ones(len(first), jnp.int32)

    def step(carry, _):
        logits, cache = carry
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        return model.extend(token[:, None], ones, cache), token

    _, tokens = jax.lax.scan(step, (first, cache), length=count)
    return tokens.T  # [B, W]
