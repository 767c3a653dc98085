"""Scores of cached tokens from the attention that they receive, and the choice of those to keep.

A score is [B, heads, S] in float32; slots that hold no token score -inf. Ties keep the earlier
token.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache.calls import Reading
from fusedkv_jax.compression.token_sets import read_keys

Pooling = Literal["max", "average"]
Grouping = Literal["mean", "max", "sum"]

_KEYS, _QUERIES = 1024, 64  # tile of the probabilities that exist at once


def received(
    reading: Reading,
    positions: Int[Array, "B t"],
    lengths: Int[Array, "B"],
    weights: Float[Array, "B t"] | None = None,
) -> Float[Array, "B N S"]:
    """Attention probability that each token receives, summed over the queries of a reading.

    The probabilities of attention that has been computed already: exp(score - lse), in tiles.

    Args:
        reading: its first piece holds the token at position s in slot s.
        positions: positions of the queries; negative ones count for nothing.
        lengths: number of keys present.
        weights: of the queries in the sum, 1 by default.
    """
    q, keys, lse, softcap = reading.q, read_keys(reading), reading.lse, reading.softcap
    batch, rows, heads, size = q.shape
    slots, kv_heads = keys.shape[1:3]
    wide, tall = min(_KEYS, slots), min(_QUERIES, rows)
    keys = jnp.pad(keys, ((0, 0), (0, -slots % wide), (0, 0), (0, 0)))
    pad = ((0, 0), (0, -rows % tall))
    q, lse = jnp.pad(q, (*pad, (0, 0), (0, 0))), jnp.pad(lse, (*pad, (0, 0)))
    weights = jnp.ones(positions.shape, jnp.float32) if weights is None else weights
    positions = jnp.pad(positions, pad, constant_values=-1)
    weights = jnp.pad(weights, pad)
    q = q.reshape(batch, -1, tall, kv_heads, heads // kv_heads, size)
    lse = lse.reshape(batch, -1, tall, kv_heads, heads // kv_heads)
    positions, weights = (x.reshape(batch, -1, tall) for x in (positions, weights))

    def columns(start: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(keys, start, wide, 1).astype(jnp.float32)
        slot = (start + jnp.arange(wide))[None, None]

        def add(total: Array, block: tuple[Array, ...]) -> tuple[Array, None]:
            q, lse, place, weight = block  # [B, tall, K, G, H], [B, tall, K, G], [B, tall] twice
            place, weight = place[:, :, None], weight[:, :, None, None, None]
            seen = (slot <= place) & (slot < lengths[:, None, None])
            score = jnp.einsum("BtKGH,BsKH->BtKGs", q.astype(jnp.float32), part) * size**-0.5
            score = score if softcap is None else softcap * jnp.tanh(score / softcap)
            seen = seen[:, :, None, None]
            mass = weight * jnp.exp(jnp.where(seen, score - lse[..., None], -jnp.inf))
            return total + jnp.where(seen, mass, 0).sum(1), None

        zero = jnp.zeros((batch, kv_heads, heads // kv_heads, wide), jnp.float32)
        blocks = tuple(jnp.moveaxis(x, 1, 0) for x in (q, lse, positions, weights))
        return jax.lax.scan(add, zero, blocks)[0]

    parts = jax.lax.map(columns, jnp.arange(0, keys.shape[1], wide))  # [n, B, K, G, wide]
    return jnp.moveaxis(parts, 0, 3).reshape(batch, heads, -1)[:, :, :slots]


def pool(
    scores: Float[Array, "B N S"], counted: Int[Array, "B"], kernel: int, pooling: Pooling
) -> Float[Array, "B N S"]:
    """Each score over its neighbors, stride 1, within the first `counted` tokens of a row.

    A maximum ignores what lies outside, an average counts it as 0, as `torch.nn.functional`'s
    one-dimensional pooling with padding kernel // 2 does.

    Returns:
        Pooled scores; tokens from `counted` on score -inf.
    """
    inside = (jnp.arange(scores.shape[2]) < counted[:, None])[:, None]
    outside = -jnp.inf if pooling == "max" else 0.0
    reduce = jax.lax.max if pooling == "max" else jax.lax.add
    side = (kernel // 2, (kernel - 1) // 2)
    pooled = jax.lax.reduce_window(
        jnp.where(inside, scores, outside), outside, reduce, (1, 1, kernel), (1, 1, 1),
        ((0, 0), (0, 0), side),
    )  # fmt: skip
    pooled = pooled if pooling == "max" else pooled / kernel
    return jnp.where(inside, pooled, -jnp.inf)


def per_kv_head(
    scores: Float[Array, "B N S"], kv_heads: int, grouping: Grouping = "mean"
) -> Float[Array, "B K S"]:
    """One score for each KV head, from those of the query heads that share it."""
    batch, heads, slots = scores.shape
    grouped = scores.reshape(batch, kv_heads, heads // kv_heads, slots)
    return getattr(jnp, grouping)(grouped, axis=2)


def keep(
    scores: Float[Array, "B K S"], lengths: Int[Array, "B"], budget: int, recent: int
) -> Int[Array, "B K C"]:
    """Slots of the `recent` last tokens of each row and of the best others, `budget` in all.

    Args:
        scores: of all slots, the token at position s in slot s.
        lengths: tokens in each row.
        budget: slots to keep, at most S.
        recent: last tokens that stay whatever they score.

    Returns:
        int32 slots in ascending order. A row with fewer tokens than the budget keeps all, in their
        places; what follows them is padding.
    """
    slot = jnp.arange(scores.shape[2])
    last = (slot >= lengths[:, None] - recent)[:, None]
    present = (slot < lengths[:, None])[:, None]
    scores = jnp.where(last, jnp.inf, jnp.where(jnp.isneginf(scores), -jnp.finfo("f").max, scores))
    scores = jnp.where(present, scores, -jnp.inf)
    return jnp.sort(jax.lax.top_k(scores, budget)[1], axis=2).astype(jnp.int32)
