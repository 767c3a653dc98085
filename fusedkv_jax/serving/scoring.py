"""Log-probabilities of prompts: a program of its own, in which every token passes all layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from fusedkv_jax.cache.paged import Lane, PagedCall, PagedStore
from fusedkv_jax.generation.logprobs import Logprobs, score
from fusedkv_jax.model import Decoder
from fusedkv_jax.model.paging import extend_pages
from fusedkv_jax.serving.plan import StepPlan
from fusedkv_jax.serving.request import Request


class ScoredTokens(NamedTuple):
    """Tokens of a prompt that are scored together, as arrays.

    Attributes:
        tokens: int32, padded, [C].
        lane: their pages and positions.
        targets: int32 tokens that follow each, padded, [C].
    """

    tokens: np.ndarray
    lane: Lane
    targets: np.ndarray


class PromptChunk(NamedTuple):
    """A part of a prompt.

    Attributes:
        place: of its request in the plan.
        start: position of the first token.
        count: tokens that another one of the prompt follows.
        arrays: all of it.
    """

    place: int
    start: int
    count: int
    arrays: ScoredTokens


@functools.partial(jax.jit, static_argnames=("graph", "k"), donate_argnames="pool")
def run_scored(
    graph: nnx.GraphDef[Decoder],
    params: PyTree,
    pool: PagedStore,
    scored: ScoredTokens,
    k: int,
) -> tuple[Logprobs, PagedStore]:
    """Add tokens to the pool, and score what follows each: `extend_pages` for all layers."""
    everyone, call = jnp.arange(scored.tokens.shape[0])[None], PagedCall.of((scored.lane,))
    model, tokens = nnx.merge(graph, params), jnp.asarray(scored.tokens)
    logits, pool = extend_pages(model, tokens, call, pool, everyone)
    assert logits is not None
    return score(logits, jnp.asarray(scored.targets), k), pool


def scored_chunks(plan: StepPlan, columns: int, width: int) -> Iterator[PromptChunk]:
    """What of a plan is scored, `columns` tokens at a time; tables have `width` entries."""
    for place, (request, count) in enumerate(zip(plan.requests, plan.counts, strict=True)):
        if is_scored(request):
            end = request.computed + count
            for start in range(request.computed, end, columns):
                stop = min(start + columns, end)
                arrays = no_tokens(columns, width)
                yield PromptChunk(place, start, _fill(arrays, request, start, stop), arrays)


def is_scored(request: Request) -> bool:
    """Whether its next tokens are to be scored: another token of the prompt follows them."""
    return request.scored and request.computed < len(request.prompt) - 1


def no_tokens(columns: int, width: int) -> ScoredTokens:
    """Arrays of this shape without a token, to be filled or to compile what takes them."""
    tokens, targets = np.zeros((2, columns), np.int32)
    lane = Lane(np.zeros((1, width), np.int32), np.full((1, columns), -1, np.int32))
    return ScoredTokens(tokens, lane, targets)


def _fill(arrays: ScoredTokens, request: Request, start: int, stop: int) -> int:
    """Put down a part of a prompt; how many of its tokens another one follows."""
    count = stop - start
    arrays.lane.table[0, : len(request.pages)] = request.pages
    arrays.lane.positions[0, :count] = np.arange(start, stop)
    arrays.tokens[:count] = request.prompt[start:stop]
    following = request.prompt[start + 1 : stop + 1]
    arrays.targets[: len(following)] = following
    return len(following)
