"""What prompts begin with, prefilled once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusedkv_jax.cache import KVCache
from fusedkv_jax.generation.buckets import SHORTEST_BUCKET
from fusedkv_jax.generation.chunked_prefill import PrefillPlan, PromptArrays
from fusedkv_jax.generation.engine import OfflineEngine
from fusedkv_jax.generation.requests import PreparedRequest


@dataclass(frozen=True)
class Prefix:
    """Tokens that prompts begin with.

    Attributes:
        tokens: the tokens.
        length: tokens that a row of the cache holds, and of every cache that is made from it.
        cache: holds them, in one row.
    """

    tokens: tuple[int, ...]
    length: int
    cache: KVCache


def shared_prefix(engine: OfflineEngine, requests: Sequence[PreparedRequest]) -> Prefix | None:
    """What all prompts begin with, if it is worth while.

    Cyclic layouts are left out: there several passes approximate what token by token gives, and
    the approximation depends on where a prompt is cut. So are requests that want log-probabilities
    of their prompts.
    """
    settings = engine.settings
    plain = [r for r in requests if r.params.prompt_logprobs is None]
    alone = not settings.enable_prefix_caching or settings.compression or settings.prefill_parts
    if alone or engine.config.kv_layout.is_cyclic or len(plain) < 2:
        return None
    first, last = min(r.prompt for r in plain), max(r.prompt for r in plain)
    most = min(len(r.prompt) for r in plain) - 1  # the last token's logits are needed
    common = next((i for i in range(most) if first[i] != last[i]), most)
    if common < SHORTEST_BUCKET:
        return None
    length = engine.buckets.size(max(r.limit for r in plain))
    return prefill_prefix(engine, first[:common], length)


def prefill_prefix(engine: OfflineEngine, tokens: tuple[int, ...], length: int) -> Prefix:
    """A prefix in a cache of `length` tokens."""
    prompt = np.zeros((1, engine.buckets.size(len(tokens))), np.int32)
    prompt[0, : len(tokens)] = tokens
    prompts = PromptArrays(prompt, np.array([len(tokens)]))
    plan = PrefillPlan(engine.buckets.width(1), final="none")
    cache = engine.programs.empty_cache(1, length)
    return Prefix(tokens, length, engine.programs.prefill(prompts, cache, plan).cache)
