"""Drafts by the model's own lower layers, over pages (LayerSkip, arXiv 2404.16710)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from fusedkv_jax.cache.paged import Lane, PagedCall, PagedStore
from fusedkv_jax.generation.speculation import SelfSpeculation
from fusedkv_jax.model import Decoder
from fusedkv_jax.model.paging import exit_pages
from fusedkv_jax.model.transform import split_at
from fusedkv_jax.serving.draws import Draws, draw_tokens


class _PagedDrafting(NamedTuple):
    """Drafts while they grow.

    Attributes:
        pool: holds what the lower layers cache of them; whatever checks a draft writes it again.
        token: what passes next, [R].
        draws: how the next token is drawn.
        count: drafted tokens, [R].
        tokens: them, [R, k].
        chance: estimated probability that all of them are right, [R].
    """

    pool: PagedStore
    token: Int[Array, "R"]
    draws: Draws
    count: Int[Array, "R"]
    tokens: Int[Array, "R k"]
    chance: Float[Array, "R"]


@functools.partial(jax.jit, static_argnames=("graph", "speculation"), donate_argnames="pool")
def run_draft(
    graph: nnx.GraphDef[Decoder],
    params: PyTree,
    pool: PagedStore,
    tokens: Int[Array, "R"],
    lane: Lane,
    room: Int[Array, "R"],
    draws: Draws,
    speculation: SelfSpeculation,
) -> tuple[tuple[Any, Any], PagedStore]:
    """Draft tokens for requests that decode.

    Each is drawn from the early exit's logits as the step will draw it from the model's, with the
    same random key, so that equal distributions give equal tokens.

    Args:
        graph, params: the model.
        pool: the pages.
        tokens: int32 last known token of each request.
        lane: their pages and positions, one of each request.
        room: int32 number of tokens to draft at most.
        draws: how the token behind them is drawn.
        speculation: how it is drafted.

    Returns:
        The drafts [R, draft_tokens] and their lengths [R], and the pool.
    """
    model = nnx.merge(graph, params)
    exit_layer = speculation.layers(model.config)
    worth = exit_layer / model.config.num_layers if speculation.adaptive else 0.0
    model = split_at(model, exit_layer)
    rows, start = jnp.arange(tokens.shape[0]), jnp.asarray(lane.positions)
    # Masks need the host, and nobody wants to know how likely a draft is.
    draws = dataclasses.replace(draws, held=jnp.bool_(False), scored=jnp.bool_(False))

    def running(now: _PagedDrafting) -> Bool[Array, "R"]:
        return (now.count < room) & (now.chance >= worth)

    def step(now: _PagedDrafting) -> _PagedDrafting:
        runs = running(now)
        positions = jnp.where(runs[:, None], start + now.count[:, None], -1)
        call = PagedCall.of((Lane(lane.table, positions),))
        logits, pool = exit_pages(model, now.token, call, now.pool, exit_layer)
        token, _ = draw_tokens(logits, now.draws, 0)
        token = jnp.maximum(token, 0)  # where nothing can be drawn, the step will say so
        sure = jax.nn.softmax(logits).max(-1) if speculation.adaptive else 1.0
        place = jnp.where(runs, now.count, speculation.draft_tokens)
        length = jnp.where(runs, now.draws.lengths, now.draws.tokens.shape[1])
        return _PagedDrafting(
            pool=pool,
            token=jnp.where(runs, token, now.token),
            draws=dataclasses.replace(
                now.draws,
                tokens=now.draws.tokens.at[rows, length].set(token, mode="drop"),
                lengths=now.draws.lengths + runs,
            ),
            count=now.count + runs,
            tokens=now.tokens.at[rows, place].set(token, mode="drop"),
            chance=now.chance * sure,
        )

    begin = _PagedDrafting(
        pool=pool,
        token=tokens,
        draws=draws,
        count=jnp.zeros_like(room),
        tokens=jnp.zeros((len(rows), speculation.draft_tokens), jnp.int32),
        chance=jnp.ones(len(rows), jnp.float32),
    )
    end = jax.lax.while_loop(lambda now: jnp.any(running(now)), step, begin)
    return (end.tokens, end.count), end.pool
