"""How an engine serves; names and meaning are vLLM's where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from fusedkv_jax.cache.paged import check_paged, page_bytes
from fusedkv_jax.cache.storage import storage_type
from fusedkv_jax.compression.compressor import Compressor
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.generation.settings import check_whole
from fusedkv_jax.serving.policies import POLICIES
from fusedkv_jax.serving.policy import Policy
from fusedkv_jax.serving.shapes import StepShapes
from fusedkv_jax.serving.speculation import Speculation
from fusedkv_jax.sharding import MeshConfig, make_mesh
from fusedkv_jax.validation import check_type

_WITHOUT_DEVICE_MEMORY = 2**30  # bytes of the pool where the device does not tell its memory


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """How a model is served.

    Attributes:
        tensor_parallel_size: devices that share every step; heads, feed-forward, vocabulary and,
            where their heads divide by it, caches are split over them.
        max_num_seqs: requests in a step at most.
        max_num_batched_tokens: tokens in a step at most; longer prompts come in chunks.
        max_model_len: tokens that a request can come to; by default the model's `max_length`, or
            what the pool holds if that is less.
        page_size: tokens of a page. For 8-bit caches on TPU a power of two, as the kernel reads
            them.
        num_pages: pages of the pool; by default as many as fit in the memory below.
        kv_cache_memory_bytes: bytes of the caches; by default what `gpu_memory_utilization` leaves.
        gpu_memory_utilization: part of the device's memory that may be used, model included. A
            device that does not tell its memory (a CPU) gets a pool of 1 GiB.
        host_pages: pages of a second pool in host memory.
        cache_dtype: storage type of the caches, by default the model's activation type.
        memory: how caches lie: in `pages`, or in `slots`, a row of a contiguous cache for each
            request, as `generate` has it; see `CacheForm.choose`, which `auto` leaves it to.
        compression: a compressor of `fusedkv_jax.compression`, which shrinks what prompts leave in
            their slots.
        max_output_len: with a compressor, tokens that an output can come to, for which there is
            room beside what it keeps; by default a quarter of `max_model_len`.
        enable_prefix_caching: keep the pages of prompts that have ended, and share them; slots
            share nothing.
        speculation: guess tokens and check several of a request in one step, which changes no
            output: `NGramSpeculation` looks them up, `SelfSpeculation` lets the lower layers draft.
            In steps with a part of a prompt nothing is drafted, nor where drafts make steps slower
            for each token (`DraftSwitch`).
        async_scheduling: plan each step while the device computes the one before, whose tokens it
            finds there. Outputs are the same and come faster; what arrives meanwhile begins a step
            later. Steps wait for each other where more than the number of tokens decides what is
            next: with speculation, structured output, scored prompts.
        policy: who comes first: a name of `POLICIES`, or a policy.
        max_logprobs: likeliest tokens that a request may ask for.
        eos_id: end-of-text token where there is no tokenizer, or instead of its own.
        add_special_tokens: texts begin with the tokenizer's BOS token.
        shapes: sizes of a step's arrays; by default chosen for the device.

    Raises:
        ValueError: a value of the wrong kind or out of bounds.
    """

    tensor_parallel_size: int = 1
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    page_size: int = 16
    num_pages: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    host_pages: int = 0
    cache_dtype: str | None = None
    memory: Literal["auto", "pages", "slots"] = "auto"
    compression: Compressor | None = None
    max_output_len: int | None = None
    enable_prefix_caching: bool = True
    speculation: Speculation | None = None
    async_scheduling: bool = True
    policy: str | Policy = "fcfs"
    max_logprobs: int = 20
    eos_id: int | None = None
    add_special_tokens: bool = True
    shapes: StepShapes | None = None

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens", "page_size"):
            check_whole(name, getattr(self, name), 1)
        for name in ("max_model_len", "max_output_len", "num_pages", "kv_cache_memory_bytes"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        for name in ("host_pages", "max_logprobs"):
            check_whole(name, getattr(self, name), 0)
        for name in ("add_special_tokens", "async_scheduling", "enable_prefix_caching"):
            check_type(name, getattr(self, name), bool, ValueError)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization={self.gpu_memory_utilization}; use above 0, at most 1"
            )
        if self.compression is None and self.max_output_len is not None:
            raise ValueError("max_output_len is for compressors; leave it out, or set compression")
        if self.memory not in ("auto", "pages", "slots"):
            raise ValueError(f"memory={self.memory!r}; use auto, pages or slots")
        if self.speculation is not None and not isinstance(self.speculation, Speculation):
            raise ValueError(
                f"speculation={self.speculation!r}; use fkv.NGramSpeculation(...) or"
                " fkv.SelfSpeculation(...)"
            )
        if self.compression is not None and not isinstance(self.compression, Compressor):
            raise ValueError(
                f"compression={self.compression!r}; use a compressor, such as"
                " fkv.compression.SnapKV(budget=1024)"
            )
        named = isinstance(self.policy, str) and self.policy in POLICIES
        if not named and not isinstance(self.policy, Policy):
            raise ValueError(
                f"policy={self.policy!r}; use a policy, or one of {', '.join(sorted(POLICIES))}"
            )

    @property
    def draft_tokens(self) -> int:
        """Tokens that are drafted for a request at most."""
        return 0 if self.speculation is None else self.speculation.draft_tokens

    def make_policy(self) -> Policy:
        """The policy."""
        return POLICIES[self.policy]() if isinstance(self.policy, str) else self.policy

    def make_shapes(self) -> StepShapes:
        """Sizes of a step's arrays."""
        return self.shapes or StepShapes.choose(self.max_num_seqs, self.max_num_batched_tokens)

    def pages(self, config: ModelConfig) -> int:
        """Pages of the pool of a model.

        Raises:
            ValueError: a cache that cannot lie in pages, or no memory for a page.
        """
        dtype = storage_type(config.dtype if self.cache_dtype is None else self.cache_dtype)
        check_paged(config, dtype)
        if self.num_pages is not None:
            return self.num_pages
        page = page_bytes(config, self.page_size, dtype)
        available = self.cache_bytes(config)
        if available < page:
            raise ValueError(
                f"a page takes {page} bytes and {available} are free; raise kv_cache_memory_bytes"
                " or gpu_memory_utilization"
            )
        most = self.max_num_seqs * -(-config.max_length // self.page_size)
        return min(available // page, 4 * most)  # beyond that, pages would only be remembered

    def model_length(self, config: ModelConfig, largest: int) -> int:
        """Tokens that a request can come to, in a pool that holds one of `largest`.

        Raises:
            ValueError: more are asked for than the model or the pool has room for.
        """
        most = min(config.max_length, largest)
        if self.max_model_len is not None and self.max_model_len > most:
            raise ValueError(
                f"max_model_len={self.max_model_len}; the model takes {config.max_length} tokens"
                f" and the pool holds {largest}: lower it, or enlarge num_pages"
            )
        return self.max_model_len or most

    def mesh(self) -> Mesh | None:
        """The devices that share every step; None for one.

        Raises:
            ValueError: there are not so many.
        """
        size = self.tensor_parallel_size
        return None if size == 1 else make_mesh(MeshConfig(data=1, tensor=size, devices=size))

    def cache_bytes(self, config: ModelConfig) -> int:
        """Bytes that caches may take, over all devices."""
        if self.kv_cache_memory_bytes is not None:
            return self.kv_cache_memory_bytes
        stats: Any = jax.devices()[0].memory_stats() or {}
        if "bytes_limit" not in stats:
            return _WITHOUT_DEVICE_MEMORY
        free = self.gpu_memory_utilization * stats["bytes_limit"] - stats["bytes_in_use"]
        split = config.stream_shapes["key"][0] % self.tensor_parallel_size == 0
        return int(free) * (self.tensor_parallel_size if split else 1)
