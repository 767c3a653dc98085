"""How the caches of requests lie in memory: in pages of one pool, or each in a slot."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import jax

from fusedkv_jax.cache import KVCache, cache_plan
from fusedkv_jax.cache.paged import check_paged
from fusedkv_jax.cache.storage import storage_type
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.serving.compressed_rows import compressed_row
from fusedkv_jax.serving.memory import PagedMemory
from fusedkv_jax.serving.settings import ServingSettings


@dataclass(frozen=True)
class CacheForm:
    """Pages or slots, how many, and how large.

    A slot is a row of a contiguous cache, as `generate` has it, with room for the longest request.
    To the scheduler it is a page that holds all of a request, so that nothing but the runner has
    to tell them apart.

    Attributes:
        kind: what they are.
        count: of them.
        size: tokens of each.
        max_model_len: tokens that a request can come to.
        whole_prompts: what a prompt computes depends on where it is cut, so that it is not cut.
        max_output_len: tokens that an output can come to; None for what the request can.
        reason: why they are slots.
    """

    kind: Literal["pages", "slots"]
    count: int
    size: int
    max_model_len: int
    whole_prompts: bool = False
    max_output_len: int | None = None
    reason: str = ""

    @classmethod
    def choose(cls, config: ModelConfig, settings: ServingSettings) -> CacheForm:
        """That of a model: pages where its cache can lie in pages, unless the settings say.

        A cache of windows alone lies in slots where requests can be much longer than they are: a
        ring holds the last tokens, pages would hold all.

        Raises:
            ValueError: settings that do not fit the model, or no memory.
        """
        reason = _reason_for_slots(config, settings)
        if reason is not None:
            return _slots(config, settings, reason)
        count = settings.pages(config)
        pages = cls("pages", count, settings.page_size, 0)
        length = settings.model_length(config, pages.memory(settings).largest)
        return cls("pages", count, settings.page_size, length)

    def memory(self, settings: ServingSettings) -> PagedMemory:
        """Who holds which of them."""
        if self.kind == "slots":
            return PagedMemory(self.count, self.size, prefix_caching=False, reserve=0)
        return PagedMemory(
            self.count,
            self.size,
            host_pages=settings.host_pages,
            prefix_caching=settings.enable_prefix_caching,
        )

    def step_tokens(self, settings: ServingSettings) -> int:
        """Tokens of a step: a prompt that is not cut must fit in beside all that decode."""
        least = self.max_model_len + settings.max_num_seqs if self.whole_prompts else 0
        return max(settings.max_num_batched_tokens, least)

    def __str__(self) -> str:
        lie = f"caches lie in {self.count} {self.kind} of {self.size} tokens"
        if self.kind == "pages":
            return lie
        cut = "; prompts are not cut into chunks" if self.whole_prompts else ""
        return f"{lie} and share no prefixes{cut}: {self.reason}"


def _reason_for_slots(config: ModelConfig, settings: ServingSettings) -> str | None:
    """Why caches lie in slots; None where they lie in pages. Raises ValueError as `choose`."""
    try:
        check_paged(config, _dtype(config, settings))
    except ValueError as error:
        if settings.memory == "pages":
            raise
        return str(error).partition(";")[0]
    if settings.compression is not None:
        if settings.memory == "pages":
            raise ValueError("memory='pages' and compression exclude each other; leave memory out")
        return f"{settings.compression.title} shrinks what prompts leave"
    if settings.memory == "slots":
        return "memory='slots'"
    windows = cache_plan(config.kv_layout).windows
    length = settings.max_model_len or config.max_length
    short = all(window is not None and 2 * window <= length for window in windows)
    wants_pages = settings.memory == "pages" or settings.num_pages or settings.host_pages
    return "all that is cached is windowed, so rings hold it" if short and not wants_pages else None


def _slots(config: ModelConfig, settings: ServingSettings, reason: str) -> CacheForm:
    for name in ("num_pages", "host_pages"):
        if getattr(settings, name):
            raise ValueError(
                f"{name}={getattr(settings, name)} is for pages, and caches lie in slots: {reason};"
                " leave it out, max_num_seqs and max_model_len say how many slots there are"
            )
    length = settings.model_length(config, config.max_length)
    room = None
    if settings.compression is not None:
        room = min(settings.max_output_len or max(1, length // 4), length - 1)
        slot = compressed_row(config, settings, length, room).nbytes
    else:
        create = functools.partial(KVCache.create, config, batch_size=1, max_length=length)
        slot = jax.eval_shape(functools.partial(create, dtype=_dtype(config, settings))).nbytes
    available = settings.cache_bytes(config)
    if available < slot:
        raise ValueError(
            f"a slot of {length} tokens takes {slot} bytes and {available} are free; lower"
            " max_model_len, or raise kv_cache_memory_bytes or gpu_memory_utilization"
        )
    count = min(settings.max_num_seqs, available // slot)
    whole = config.kv_layout.is_cyclic or room is not None
    return CacheForm("slots", count, length, length, whole, room, reason)


def _dtype(config: ModelConfig, settings: ServingSettings) -> str:
    return storage_type(config.dtype if settings.cache_dtype is None else settings.cache_dtype)
