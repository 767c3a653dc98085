"""Schedule for long calls: tiles with an online softmax.

Tiles in which nothing is visible are never visited, whatever hides them (causality, window,
lengths, segments, ring order).

    forward                                     backward
    for each block of queries:                  for each tile of keys:
        for each tile that it sees:                 mix key and value; dkey, dvalue = 0
            mix key and value                       for each block of queries that sees it:
            s = q.key^T                                 dq, dkey, dvalue += `tiles.gradients`
            total, out, top: online softmax         write dkey and dvalue
        write out / total, and lse              write dq
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import linear
from pallas_kernels.masks import Integers, Mask
from pallas_kernels.xla import tiles
from pallas_kernels.xla.chunk import RowChunk
from pallas_kernels.xla.tiles import Cotangents, Places

FAR = 2**30  # beyond every position and segment id


def active(mask: Mask, queries: Places, keys: Places, block_q: int, block_k: int) -> Array:
    """Whether anything may be visible in a tile, bool [query blocks, key blocks].

    Decided by the extremes of positions and segments in each block over the rows of the
    batch, so a tile that is kept may still be empty, but none that is dropped matters.
    """
    q_low, q_high = _extremes(queries.positions, None, block_q)
    present = keys.positions >= 0 if mask.ragged else None
    k_low, k_high = _extremes(keys.positions, present, block_k)
    table = (k_low <= k_high) & (q_low <= q_high)[:, None]
    if mask.causal:
        table &= k_low <= q_high[:, None]
    if mask.window is not None:
        table &= q_low[:, None] - k_high < mask.window
    if queries.segment_ids is not None:
        q_low, q_high = _extremes(queries.segment_ids, queries.segment_ids >= 0, block_q)
        k_low, k_high = _extremes(keys.segment_ids, keys.segment_ids >= 0, block_k)
        table &= (k_low <= q_high[:, None]) & (q_low[:, None] <= k_high)
    return table


def _extremes(numbers: Integers, valid: Integers | None, block: int) -> tuple[Array, Array]:
    """Minimum and maximum of the valid numbers of each block; an empty one has FAR, -FAR."""
    low = numbers if valid is None else jnp.where(valid, numbers, FAR)
    high = numbers if valid is None else jnp.where(valid, numbers, -FAR)
    width = (0, 0), (0, -numbers.shape[1] % block)
    low = jnp.pad(low, width, constant_values=FAR).reshape(numbers.shape[0], -1, block)
    high = jnp.pad(high, width, constant_values=-FAR).reshape(numbers.shape[0], -1, block)
    return low.min((0, 2)), high.max((0, 2))


def visits(table: Array) -> tuple[Array, Array]:
    """For each row of a table: the columns that are set, in order, and how many there are."""
    return jnp.argsort(~table, axis=1, stable=True), table.sum(1, dtype=jnp.int32)


def _split(x: Array, block: int, heads: int) -> Array:
    """[B, T, N, H] to [blocks, B, K, G * block, H], zero rows at the end."""
    batch, length, num, size = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, block, heads, num // heads, size).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(*x.shape[:3], -1, size)


def _merge(x: Array, block: int, length: int) -> Array:
    """The inverse of `_split`."""
    count, batch, heads, rows, size = x.shape
    x = x.reshape(count, batch, heads, rows // block, block, size).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, count * block, -1, size)[:, :length]


def _split_places(where: Places, block: int) -> Places:
    """Places of [blocks, B or 1, block] queries; the added ones repeat the last."""

    def split(x: Integers) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), mode="edge")
        return x.reshape(x.shape[0], -1, block).transpose(1, 0, 2)

    return jax.tree.map(split, where)


class _KeyTiles:
    """Cuts and mixes tiles of the sources.

    Mixing per tile costs a few operations per key feature, against 4 * block_q * G for the
    products, and leaves nothing of the sources' size in memory.
    """

    def __init__(self, chunk: RowChunk) -> None:
        self.streams, self.key_weights, self.value_weights = chunk.sources
        self.mask, self.dtype, self.groups = chunk.mask, chunk.q.dtype, chunk.groups
        self.block, self.places = chunk.plan.keys, chunk.keys
        self.length = self.streams.length

    def cut(self, index: Array) -> tuple[Array, Array, Places, Array | None]:
        """Key [B, K, block, H] and value tile, and their places, the last tile moved back to
        end with the keys; `fresh` [block] marks what the tile before it does not have."""
        start = jnp.minimum(index * self.block, self.length - self.block)
        where = tiles.part(self.places, start, self.block)
        present = (where.positions >= 0)[:, :, None, None] if self.mask.ragged else None
        mix = lambda sources, weights: linear.mix(  # noqa: E731
            sources, weights, self.dtype, present
        ).transpose(0, 2, 1, 3)
        keys, values = self.streams.tile(start, self.block)
        fresh = None
        if self.length % self.block:
            fresh = start + jnp.arange(self.block) >= index * self.block
        return mix(keys, self.key_weights), mix(values, self.value_weights), where, fresh

    def seen(self, queries: Places, where: Places, fresh: Array | None) -> Array | None:
        seen = tiles.hide(self.mask, queries, where, self.groups)
        if fresh is None:
            return seen
        return fresh[None, None, None] if seen is None else seen & fresh


def forward(chunk: RowChunk) -> tuple[Array, Array]:
    """Output [B, T, N, H'] and lse [B, T, N] in fp32."""
    how, q, streams = chunk.how, chunk.q, chunk.sources[0]
    block_q, heads = chunk.plan.queries, streams.heads
    cutter = _KeyTiles(chunk)
    order, count = visits(active(chunk.mask, chunk.queries, chunk.keys, block_q, chunk.plan.keys))

    def one_block(arrays: tuple[Array, Places, Array, Array]) -> tuple[Array, Array]:
        query, place, order, count = arrays

        def visit(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = carry
            key, value, key_place, fresh = cutter.cut(order[i])
            seen = cutter.seen(place, key_place, fresh)
            score = tiles.logits(how, query, key, seen)
            # The running softmax: sums so far are rescaled to the new maximum.
            higher = jnp.maximum(top, score.max(-1, keepdims=True))
            decay, weight = jnp.exp(top - higher), jnp.exp(score - higher)
            total = total * decay + weight.sum(-1, keepdims=True)
            out = out * decay + tiles.product(weight.astype(value.dtype), value, 3, 2)
            return higher, total, out

        rows = query.shape[:3]
        start = (
            jnp.full((*rows, 1), tiles.HIDDEN / 2, jnp.float32),
            jnp.zeros((*rows, 1), jnp.float32),
            jnp.zeros((*rows, streams.value_size), jnp.float32),
        )
        return tiles.finish(*lax.fori_loop(0, count, visit, start))

    arrays = (_split(q, block_q, heads), _split_places(chunk.queries, block_q), order, count)
    out, lse = lax.map(one_block, arrays)
    length = q.shape[1]
    return _merge(out, block_q, length), _merge(lse, block_q, length)[..., 0]


def backward(chunk: RowChunk, rows: Cotangents) -> tuple[Array, Array, Array]:
    """Gradients dq [B, T, N, H], dkey [B, S, K, H], dvalue [B, S, K, H'] in fp32.

    Keys are the outer loop: a tile is mixed once, and its gradients never leave the loop.
    """
    how, q, streams = chunk.how, chunk.q, chunk.sources[0]
    block_q, heads = chunk.plan.queries, streams.heads
    cutter = _KeyTiles(chunk)
    order, count = visits(active(chunk.mask, chunk.queries, chunk.keys, block_q, chunk.plan.keys).T)
    lse, dout, delta = rows
    # Added rows have lse 0 and dout 0: their weights are finite and their gradients zero.
    query, dout, lse, delta = (
        _split(x, block_q, heads) for x in (q, dout, lse[..., None], delta[..., None])
    )
    places = _split_places(chunk.queries, block_q)

    def one_tile(
        dq: Array, arrays: tuple[Array, Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        index, order, count = arrays
        key, value, key_place, fresh = cutter.cut(index)

        def visit(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dkey, dvalue = carry
            block = order[i]
            at = lambda x: lax.dynamic_index_in_dim(x, block, keepdims=False)  # noqa: E731
            seen = cutter.seen(jax.tree.map(at, places), key_place, fresh)
            dq_part, dkey_part, dvalue_part = tiles.gradients(
                how, at(query), key, value, seen,
                Cotangents(at(lse)[..., 0], at(dout), at(delta)[..., 0]),
            )  # fmt: skip
            # Queries are visited by several key tiles: their gradients are in the loop's state, and
            # one block of it is updated in place.
            dq = lax.dynamic_update_index_in_dim(dq, at(dq) + dq_part, block, 0)
            return dq, dkey + dkey_part, dvalue + dvalue_part

        flat = lambda x: jnp.zeros((*x.shape[:2], x.shape[3], x.shape[2]), jnp.float32)  # noqa: E731
        dq, dkey, dvalue = lax.fori_loop(0, count, visit, (dq, flat(key), flat(value)))
        return dq, (dkey, dvalue)

    steps = (jnp.arange(order.shape[0]), order, count)
    dq, grads = lax.scan(one_tile, jnp.zeros(query.shape, jnp.float32), steps)
    dkey, dvalue = (_assemble(x, streams.length) for x in grads)
    return _merge(dq, block_q, q.shape[1]), dkey, dvalue


def _assemble(x: Array, length: int) -> Array:
    """[tiles, B, K, H, block] to [B, S, K, H]; the last tile overlaps the one before."""
    count, batch, heads, size, block = x.shape
    over = count * block - length
    flat = lambda x: x.transpose(1, 0, 4, 2, 3).reshape(batch, -1, heads, size)  # noqa: E731
    return jnp.concatenate([flat(x[:-1]), flat(x[-1:])[:, over:]], axis=1)
