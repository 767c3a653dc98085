"""How a model is run: buckets, budgets, which requests go together, and what they share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx

from fusedkv_jax.generation.parts import part_ends
from fusedkv_jax.generation.placement import Placement
from fusedkv_jax.generation.prefill import fill
from fusedkv_jax.generation.requests import Codec, Request
from fusedkv_jax.generation.results import Rates
from fusedkv_jax.generation.sampling import bucket
from fusedkv_jax.generation.settings import EngineSettings
from fusedkv_jax.model import Decoder, check_parts, for_decoding

SHORTEST_BUCKET = 16


@dataclass(frozen=True)
class Prefix:
    """Tokens that prompts begin with, prefilled once.

    Attributes:
        tokens: the tokens.
        cache: holds them, in one row.
    """

    tokens: tuple[int, ...]
    cache: Any


@dataclass(frozen=True)
class Engine:
    """A model whose fusion is folded, and how it is run."""

    model: Decoder
    tokenizer: Any = None
    settings: EngineSettings = EngineSettings()
    rates: Rates = field(default_factory=Rates)

    def __post_init__(self) -> None:
        self.settings.check(self.model.config)
        self._check_parts(self.placement.workers)  # and the mesh

    def _check_parts(self, workers: int) -> None:
        parts = self.settings.prefill_parts
        if parts is None:
            return
        if workers == 1:
            raise ValueError(
                f"prefill_parts={parts!r} needs a mesh whose context axis takes the"
                " parts, such as mesh=make_mesh(MeshConfig(context=4))"
            )
        part_ends(workers, workers, parts)  # refuses what is no cut
        longest = self.model.config.max_length
        check_parts(self.model.config, jax.eval_shape(lambda: self.empty_cache(workers, longest)))

    @functools.cached_property
    def codec(self) -> Codec:
        """How texts become tokens and tokens text."""
        settings = self.settings
        return Codec(self.tokenizer, settings.eos_id, settings.add_special_tokens)

    @functools.cached_property
    def split(self) -> tuple[nnx.GraphDef[Decoder], Any]:
        """Structure and parameters of the model, in its form for decoding."""
        graph, params = nnx.split(for_decoding(self.model))
        return graph, self.placement.parameters(params)

    @functools.cached_property
    def placement(self) -> Placement:
        """Where it runs."""
        return Placement.of(self.settings.mesh)

    def bucket(self, size: int, least: int) -> int:
        return bucket(size, least) if self.settings.bucketing else max(1, size)

    def rows(self, count: int) -> int:
        """Rows of arrays for `count` rows: a bucket that divides over the mesh."""
        return self.placement.rows(self.bucket(count, 1))

    def empty_cache(self, rows: int, length: int) -> Any:
        sizes: Any = {"batch_size": rows, "max_length": length, "dtype": self.settings.cache_dtype}
        return self.placement.cache(self.model.config, **sizes)

    def ends(self, columns: int) -> tuple[int, ...] | None:
        """Where the parts of prompts end; None for prefill in one piece, as of very short ones."""
        workers = self.placement.workers
        if self.settings.prefill_parts is None or columns < workers:
            return None
        return part_ends(columns, workers, self.settings.prefill_parts)

    def width(self, rows: int, limit: int | None) -> int | None:
        """Tokens of a row in a chunk, so that all rows together keep within the budget."""
        if limit is None:
            return None
        width = max(1, limit // rows)
        return 1 << (width.bit_length() - 1) if self.settings.bucketing else width

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Requests that run together. Neighbors in length do, which saves padding; those that want
        log-probabilities of their prompts are apart, since their prefill runs all layers."""
        rows = min(
            self.settings.batch_size,
            self.settings.max_num_batched_tokens or self.settings.batch_size,
        )
        found: list[list[Request]] = []
        for scored in (False, True):
            own = [r for r in requests if (r.params.prompt_logprobs is not None) == scored]
            size = rows  # a new batch for the first
            for request in sorted(own, key=lambda r: len(r.prompt)):
                if size + request.params.n > rows:
                    found.append([])
                    size = 0
                found[-1].append(request)
                size += request.params.n
        return found

    def shared_prefix(self, requests: Sequence[Request]) -> tuple[Prefix | None, int]:
        """What all prompts begin with, prefilled, and the cache length that all batches then have.

        Cyclic layouts are left out: there several passes approximate what token by token gives, and
        the approximation depends on where a prompt is cut.
        """
        plain = [r for r in requests if r.params.prompt_logprobs is None]
        cyclic = self.model.config.kv_layout.is_cyclic
        alone = (
            not self.settings.enable_prefix_caching
            or self.settings.compression
            or self.settings.prefill_parts
        )
        if alone or cyclic or len(plain) < 2:
            return None, 0
        first, last = min(r.prompt for r in plain), max(r.prompt for r in plain)
        most = min(len(r.prompt) for r in plain) - 1  # the last token's logits are needed
        common = next((i for i in range(most) if first[i] != last[i]), most)
        if common < SHORTEST_BUCKET:
            return None, 0
        length = self.bucket(max(r.limit for r in plain), SHORTEST_BUCKET)
        return self.prefill_prefix(first[:common], length), length

    def prefill_prefix(self, tokens: tuple[int, ...], length: int) -> Prefix:
        """A prefix in a cache of `length` tokens."""
        prompts = np.zeros((1, self.bucket(len(tokens), SHORTEST_BUCKET)), np.int32)
        prompts[0, : len(tokens)] = tokens
        with self.placement.active():
            _, cache, _ = fill(
                self.split,
                prompts,
                np.array([len(tokens)]),
                self.empty_cache(1, length),
                width=self.width(1, self.settings.max_num_batched_tokens),
                final="none",
            )
        return Prefix(tokens, cache)
