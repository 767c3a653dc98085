"""SnapKV and PyramidKV: keep the tokens that the last prompt tokens attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache import KVCache
from fusedkv_jax.cache.calls import Reading
from fusedkv_jax.cache.plan import Group
from fusedkv_jax.compression import scoring
from fusedkv_jax.compression.budgets import pyramid_budgets
from fusedkv_jax.compression.compressor import (
    Chunk,
    CompressionError,
    Compressor,
    Observed,
    check_choice,
    check_count,
)
from fusedkv_jax.compression.scoring import Grouping, Pooling
from fusedkv_jax.compression.token_sets import (
    mean_scores,
    merged,
    refuse_windows,
    retain,
    token_sets,
)
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind
from fusedkv_jax.model import Decoder


@dataclass(frozen=True)
class SnapKV(Compressor):
    """Keep `budget` tokens of each stream and KV head (arXiv 2404.14469).

    A token's score is the attention that the prompt's last `window` tokens pay it, pooled over
    `kernel` neighbors and averaged over the query heads of a KV head; those last tokens stay.

    Attributes:
        budget: tokens to keep of a prompt; no more than `window` are the last ones.
        window: last tokens, which score the others.
        kernel: neighbors in the pooling, itself included.
        pooling: `max` or `average`.
        grouping: over the query heads of a KV head, `mean`, `max` or `sum`.

    Raises:
        CompressionError: a field is out of range.
    """

    budget: int = 1024
    window: int = 32
    kernel: int = 7
    pooling: Pooling = "max"
    grouping: Grouping = "mean"

    title: ClassVar[str] = "SnapKV"
    cyclic: ClassVar[bool] = True

    @property
    def least_chunk(self) -> int:
        """The last tokens score the others together."""
        return self.window

    def __post_init__(self) -> None:
        check_count(self, "budget", "window", "kernel")
        check_choice(self, "pooling", get_args(Pooling))
        check_choice(self, "grouping", get_args(Grouping))

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        refuse_windows(self.title, config.kv_layout, CompressionError)

    def compress(
        self, model: Decoder, chunk: Chunk, cache: KVCache, observed: Observed
    ) -> tuple[Float[Array, "B V"], KVCache]:
        layout = model.config.kv_layout
        groups = token_sets(layout)
        budgets = self.budgets(chunk.length, len(groups))
        if all(budget >= chunk.length for budget in budgets):
            return super().compress(model, chunk, cache, observed)
        room = 0 if cache.capacity is None else cache.capacity - chunk.length
        end, recent = cache.lengths + chunk.count, min(self.window, self.budget)

        def watch(reading: Reading) -> Float[Array, "B K S"]:
            return self.score(reading, chunk, end)

        tokens = chunk.tokens, chunk.count
        logits, cache, found = model.observe(*tokens, cache, watch, rows=self.window)
        indices = [
            scoring.keep(mean_scores(layout, group, found), cache.lengths, budget, recent)
            for group, budget in zip(groups, budgets, strict=True)
        ]
        return logits, _compressed(cache, groups, indices, room)

    def budgets(self, length: int, groups: int) -> tuple[int, ...]:
        """Tokens that each group of streams keeps of prompts of this bucket."""
        return (min(self.budget, length),) * groups

    def score(
        self, reading: Reading, chunk: Chunk, lengths: Int[Array, "B"]
    ) -> Float[Array, "B K S"]:
        """Scores of all slots, by the last queries of one layer; `lengths` after the chunk."""
        rows = reading.q.shape[1]
        wanted = lengths[:, None] - jnp.arange(self.window, 0, -1)
        if rows < chunk.width:  # a layer above `prefill_depth`, which has run for these rows only
            column = jnp.broadcast_to(jnp.arange(rows), wanted.shape)
        else:
            column = wanted - reading.rows.positions[:, :1]
        valid = wanted >= 0
        column = jnp.clip(column, 0, rows - 1)
        q = jnp.take_along_axis(reading.q, column[..., None, None], axis=1)
        lse = jnp.take_along_axis(reading.lse, column[..., None], axis=1)
        positions = jnp.where(valid, wanted - reading.rows.strict, -1)
        mass = scoring.received(reading._replace(q=q, lse=lse), positions, lengths)
        older = jnp.maximum(lengths - self.window, 0)
        pooled = scoring.pool(mass, older, self.kernel, self.pooling)
        return scoring.per_kv_head(pooled, reading.pieces[0].keys[0].shape[2], self.grouping)


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with budgets that fall with depth, `budget` on average (arXiv 2406.02069).

    Streams that are read together count as one layer, in the place of the lowest. All prompts of
    a batch have the budgets of its padded length, as they share arrays.

    Attributes:
        budget: tokens to keep of a prompt, on average over the layers.
        window: last tokens, which score the others.
        kernel: neighbors in the pooling.
        pooling: `max` or `average`.
        grouping: over the query heads of a KV head, `mean`, `max` or `sum`.
        beta: the top layer keeps about a `beta`-th of the mean.

    Raises:
        CompressionError: a field is out of range.
    """

    window: int = 8
    beta: int = 20

    title: ClassVar[str] = "PyramidKV"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "beta")

    def budgets(self, length: int, groups: int) -> tuple[int, ...]:
        if self.budget <= self.window:
            return super().budgets(length, groups)
        return pyramid_budgets(self.budget, self.window, length, groups, self.beta)


def _compressed(
    cache: KVCache, groups: tuple[Group, ...], indices: list[Int[Array, "B K _"]], room: int
) -> KVCache:
    """The cache with the named tokens of each group; one store if all keep as many."""
    if len({index.shape[-1] for index in indices}) > 1:
        stores = [
            retain(cache, group, index, room) for group, index in zip(groups, indices, strict=True)
        ]
        return merged(cache, groups, stores)
    whole = next(group for group in cache.plan.groups if group.window is None)
    chosen: dict[Kind, Array] = {
        kind: jnp.stack(
            [
                index
                for layer in whole.layers(kind)
                for group, index in zip(groups, indices, strict=True)
                if layer in group.layers(kind)
            ]
        )
        for kind in KINDS
    }
    return merged(cache, [whole], [retain(cache, whole, chosen, room)])
