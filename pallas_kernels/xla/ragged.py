"""Rows of different numbers of queries as calls of equal ones, as XLA's shapes are fixed."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from pallas_kernels.call import AttentionCall, RaggedAttentionCall
from pallas_kernels.masks import Mask
from pallas_kernels.sources import Result

Attend = Callable[[AttentionCall], Result]


def attention(call: RaggedAttentionCall, attend: Attend) -> Result:
    """(out, lse) of the queries of all rows; `attend` serves equal rows.

    Rows in lanes are a call for each lane. Others are cut into blocks of about the mean number of
    queries, so that at most four times the queries are computed; each block gathers its pages.
    """
    return _lanes(call, attend) if call.rows.lanes else _blocks(call, attend)


def _lanes(call: RaggedAttentionCall, attend: Attend) -> Result:
    found, row, place = [], 0, 0
    for rows, columns in call.rows.lanes:
        part, stop = slice(row, row + rows), place + rows * columns
        counts, lengths = call.rows.counts[part], call.rows.lengths[part]
        q = call.q[place:stop].reshape(rows, columns, *call.q.shape[1:])
        table = call.sources.keys[0].table[part]
        out, lse = _attend(call, attend, q, table, counts, lengths - counts)
        found.append((out.reshape(-1, *out.shape[2:]), lse.reshape(-1, lse.shape[2])))
        row, place = part.stop, stop
    outs, lses = zip(*found, strict=True)
    return jnp.concatenate(outs), jnp.concatenate(lses)


def _blocks(call: RaggedAttentionCall, attend: Attend) -> Result:
    total, num_rows = call.q.shape[0], call.rows.counts.shape[0]
    size = 1 << max(0, -(-total // num_rows) - 1).bit_length()
    blocks = call.rows.blocks(total, size)
    places = blocks.starts[:, None] + jnp.arange(size)
    q = call.q[jnp.clip(places, 0, total - 1)]
    table = call.sources.keys[0].table[blocks.rows]
    out, lse = _attend(call, attend, q, table, blocks.counts, blocks.positions)
    row, index = call.rows.owners(total)
    block, column = blocks.firsts[row] + index // size, index % size
    owned = row >= 0
    out = jnp.where(owned[:, None, None], out[block, column], 0)
    return out, jnp.where(owned[:, None], lse[block, column], -jnp.inf)


def _attend(
    call: RaggedAttentionCall, attend: Attend, q: Array, table: Array, counts: Array, first: Array
) -> Result:
    """Rows of equal shape, [B, T, N, H]: of each the first `counts` queries, from `first` on."""
    keys, values = (
        tuple(dataclasses.replace(x, table=table) for x in side) for side in call.sources[:2]
    )
    step = jnp.arange(q.shape[1], dtype=jnp.int32)
    positions = jnp.where(step < counts[:, None], first[:, None] + step, -1)
    mask = Mask(
        causal=True,
        window=call.window,
        q_positions=positions,
        kv_lengths=jnp.maximum(jnp.where(counts > 0, first + counts, 0), 0),
    )
    sources = call.sources._replace(keys=keys, values=values)
    return attend(
        AttentionCall(q=q, sources=sources, mask=mask, scale=call.scale, softcap=call.softcap)
    )
