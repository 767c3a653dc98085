"""What all compressors are: frozen settings with one budget, that prefill a cache and shrink it."""

from __future__ import annotations

import abc
import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fusedkv_jax import validation
from fusedkv_jax.cache import KiviStore, KVCache, unstacked
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.model import Decoder
from fusedkv_jax.trees import Leaf


class CompressionError(ValueError):
    """A compressor that cannot be, or cannot serve this model; the message says why and the fix."""


@dataclass(frozen=True)
class Compressor(abc.ABC):
    """Settings of a compressor; hashable, as a compiled program depends on them."""

    title: ClassVar[str]  # as papers write it
    latent: ClassVar[bool] = False  # it serves multi-head latent attention
    cyclic: ClassVar[bool] = False  # it serves layers that read layers above them

    @property
    def least_chunk(self) -> int | None:
        """Tokens of a prompt that have to run at once; None for all of them."""
        return 1

    def check(self, config: ModelConfig) -> None:
        """Raises CompressionError where a model cannot use this compressor."""
        if config.mla is not None and not self.latent:
            raise CompressionError(
                f"{self.title} works on keys and values of heads, but mla caches one latent that"
                " each layer expands by itself; use StreamingLLM, or a model without mla"
            )
        if config.kv_layout.is_cyclic and not self.cyclic:
            raise CompressionError(
                f"{self.title} cannot serve a cyclic layout, where a token does not see itself in"
                " layers that read one above; use SnapKV or StreamingLLM"
            )

    def prefill(
        self,
        model: Decoder,
        tokens: Int[Array, "B T"],
        count: Int[Array, "B"],
        cache: KVCache,
        chunk: int | None = None,
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Run whole prompts and compress what they leave in the cache.

        Args:
            model: the model.
            tokens: int32 prompts, right-padded.
            count: int32 tokens in each row.
            cache: an empty cache of `KVCache.create`, max_length S at least T.
            chunk: tokens of a prompt that run at once; the last ones are compressed with all
                others, so the result does not depend on it.

        Returns:
            Logits of each row's last token, float32, and a cache to which S - T more tokens can be
            added in every row.

        Raises:
            CompressionError: the model or the storage type of the cache cannot be served.
        """
        self.check(model.config)
        if any(isinstance(store, KiviStore) for store in cache.stores):
            raise CompressionError(
                f"{self.title} cannot be combined with an int4 cache, whose tokens are quantized"
                " 32 at a time; use int8"
            )
        if chunk is not None and chunk < 1:
            raise CompressionError(f"chunk={chunk}; use at least 1, or None")
        graph, params = nnx.split(model)
        count = jnp.asarray(count, jnp.int32)
        length = tokens.shape[1]
        prompt = Prompt(tokens, count, min(chunk or length, length))
        # The cache is not donated: what comes out has other shapes, so nothing could be reused.
        return _prefill(graph, params, self, prompt, cache)

    @abc.abstractmethod
    def run(
        self, model: Decoder, prompt: Prompt, cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """`prefill`, inside a compiled program."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tokens", "count"], meta_fields=["chunk"]
)
@dataclass(frozen=True)
class Prompt:
    """Prompts that are run in chunks, each row's last chunk as full as it can be.

    Attributes:
        tokens: int32 [B, T].
        count: int32 [B].
        chunk: columns that run at once.
    """

    tokens: Leaf
    count: Leaf
    chunk: int

    @property
    def length(self) -> int:
        """Columns of the prompts."""
        return self.tokens.shape[1]

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    def part(self, index: int | Int[Array, ""]) -> tuple[Int[Array, "B t"], Int[Array, "B"]]:
        """Tokens and counts of one chunk, which may be traced."""
        if self.chunks == 1:
            return self.tokens, self.count
        stop = jnp.maximum(self.count - (self.chunks - 1 - index) * self.chunk, 0)
        start = jnp.maximum(stop - self.chunk, 0)
        column = start[:, None] + jnp.arange(self.chunk)
        column = jnp.minimum(column, self.length - 1)
        return jnp.take_along_axis(self.tokens, column, axis=1), stop - start

    def at_least(self, chunk: int) -> Prompt:
        """The same in chunks of no fewer columns."""
        return Prompt(self.tokens, self.count, min(max(self.chunk, chunk), self.length))

    def before_last(self, model: Decoder, cache: KVCache) -> KVCache:
        """The cache after all chunks but the last."""

        def extend(index: Array, cache: KVCache) -> KVCache:
            return model.extend(*self.part(index), cache, rows="none")[1]

        if self.chunks == 1:
            return cache
        return jax.lax.fori_loop(0, self.chunks - 1, extend, cache)

    def whole(self, model: Decoder, cache: KVCache) -> tuple[Float[Array, "B V"], KVCache]:
        """Logits of the last tokens and the cache, nothing compressed."""
        cache = self.before_last(model, cache)
        logits, cache = model.extend(*self.part(self.chunks - 1), cache)
        assert logits is not None
        return logits, cache


@functools.partial(jax.jit, static_argnames=("graph", "compressor"))
def _prefill(
    graph: nnx.GraphDef[Decoder],
    params: nnx.State,
    compressor: Compressor,
    prompt: Prompt,
    cache: KVCache,
) -> tuple[Float[Array, "B V"], KVCache]:
    return compressor.run(nnx.merge(graph, params), prompt, unstacked(cache))


def check_count(compressor: Compressor, *names: str, least: int = 1) -> None:
    """Raises CompressionError unless the fields are whole numbers of at least `least`."""
    for name in names:
        value = getattr(compressor, name)
        if type(value) is not int or value < least:
            raise CompressionError(
                f"{compressor.title}: {name}={value!r}; use a whole number of at least {least}"
            )


def check_flags(compressor: Compressor, *names: str) -> None:
    """Raises CompressionError unless the fields are True or False."""
    for name in names:
        title = f"{compressor.title}: {name}"
        validation.check_type(title, getattr(compressor, name), bool, CompressionError)


def check_choice(compressor: Compressor, name: str, choices: tuple[object, ...]) -> None:
    """Raises CompressionError unless the field has one of the values."""
    value = getattr(compressor, name)
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise CompressionError(f"{compressor.title}: {name}={value!r}; choose {known}")


def check_share(compressor: Compressor, name: str) -> None:
    """Raises CompressionError unless the field is a share of more than 0 and at most 1."""
    value = getattr(compressor, name)
    if type(value) not in (int, float) or not 0 < value <= 1 or math.isnan(value):
        raise CompressionError(
            f"{compressor.title}: {name}={value!r}; use a share, above 0 and at most 1"
        )
