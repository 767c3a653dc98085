"""What all compressors are: frozen settings with one budget, that observe prompts and compact."""

from __future__ import annotations

import abc
import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import jax
from jaxtyping import Array, Float, PyTree

from fusedkv_jax import validation
from fusedkv_jax.cache import KVCache
from fusedkv_jax.cache.kivi import KiviStore
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.model import Decoder
from fusedkv_jax.trees import Leaf

Observed = PyTree  # arrays, as each compressor needs them; None for nothing


class CompressionError(ValueError):
    """A compressor that cannot be, or cannot serve this model; the message says why and the fix."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tokens", "count"], meta_fields=["length"]
)
@dataclass(frozen=True)
class Chunk:
    """Tokens of prompts that run at once.

    Attributes:
        tokens: int32, right-padded, [B, t].
        count: int32 tokens in each row, [B].
        length: columns of the whole prompts, T.
    """

    tokens: Leaf
    count: Leaf
    length: int

    @property
    def width(self) -> int:
        """Columns of the chunk, t."""
        return self.tokens.shape[1]


@dataclass(frozen=True)
class Compressor(abc.ABC):
    """Settings of a compressor; hashable, as a compiled program depends on them.

    Prefill (`fusedkv_jax.generation.compressed_prefill`) drives it through a prompt: `begin`,
    `observe` for every chunk but the last, `compress` for the last. Each row's last chunk is as
    full as it can be. All three run inside compiled programs.
    """

    title: ClassVar[str]  # as papers write it; by default the name of the class
    latent: ClassVar[bool] = False  # it serves multi-head latent attention
    cyclic: ClassVar[bool] = False  # it serves layers that read layers above them
    rewinds: ClassVar[bool] = True  # a rejected draft can be taken back from what it keeps

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.title = vars(cls).get("title", cls.__name__)

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

    def begin(self, config: ModelConfig, cache: KVCache) -> tuple[KVCache, Observed]:
        """What prompts are run into, and what has been observed before their first token.

        Args:
            config: of the model.
            cache: an empty cache of `KVCache.create`.

        Raises:
            CompressionError: its storage type cannot be compressed.
        """
        if any(isinstance(store, KiviStore) for store in cache.stores):
            raise CompressionError(
                f"{self.title} cannot be combined with an int4 cache, whose tokens are quantized"
                " 32 at a time; use int8"
            )
        return cache, None

    def observe(
        self, model: Decoder, chunk: Chunk, cache: KVCache, observed: Observed
    ) -> tuple[KVCache, Observed]:
        """Run a chunk that others follow: the extended cache, and what has been observed so far."""
        _, cache = model.extend(chunk.tokens, chunk.count, cache, rows="none")
        return cache, observed

    def compress(
        self, model: Decoder, chunk: Chunk, cache: KVCache, observed: Observed
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Run the last chunk and shrink the cache; here nothing is taken from it.

        Returns:
            Logits of each row's last token, float32, and the compressed cache.
        """
        logits, cache = model.extend(chunk.tokens, chunk.count, cache)
        assert logits is not None
        return logits, cache


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
