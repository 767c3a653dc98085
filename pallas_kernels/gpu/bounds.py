"""Which tiles a block has to visit, as integers that depend on the mask alone.

Every layer of a model with the same mask computes the same table, so the compiler computes it
once; a kernel loads four numbers of it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels import masks
from pallas_kernels.masks import Integers, Mask

_FAR = 2**30  # beyond every position and segment id


def token_span(mask: Mask, num_queries: int, num_keys: int) -> Int[Array, "B 2"]:
    """First and one past the last key that any query of a row may see, [B or 1, 2]."""
    high = jnp.full((1,), num_keys) if mask.kv_lengths is None else mask.kv_lengths
    low = jnp.zeros_like(high)
    if mask.kv_positions is None:  # a key's index is its position
        positions = jnp.asarray(masks.query_positions(mask, num_queries, num_keys))
        if mask.causal:
            high = jnp.minimum(high, positions.max(1) + 1)
        if mask.window is not None:
            low = jnp.maximum(low, positions.min(1) - mask.window + 1)
    high = jnp.clip(high, 0, num_keys)
    return jnp.stack(jnp.broadcast_arrays(jnp.minimum(low, high), high), 1).astype(jnp.int32)


def tiles(
    mask: Mask, num_queries: int, num_keys: int, groups: int, rows: int, keys: int
) -> tuple[Bool[Array, "B I J"], Bool[Array, "B I J"]]:
    """For blocks of `rows` rows and tiles of `keys` keys: (something may be seen, all is seen).

    Decided by the extremes of positions and segments in a block, so a tile that is kept may
    still be empty, but none that is dropped matters, and one called clear is.
    """
    q_at = _per_row(masks.query_positions(mask, num_queries, num_keys), groups, rows)
    k_at = jnp.asarray(masks.key_positions(mask, num_keys))
    k_at = _blocks(k_at, keys, masks.ABSENT)
    q_low, q_high = q_at.min(2)[:, :, None], q_at.max(2)[:, :, None]  # [B, I, 1]
    k_low = k_at.min(2)[:, None, :]  # [B, 1, J]; an absent key makes it negative
    present_low = jnp.where(k_at < 0, _FAR, k_at).min(2)[:, None, :]
    k_high = k_at.max(2)[:, None, :]
    some = jnp.broadcast_to(k_high >= 0, jnp.broadcast_shapes(k_high.shape, q_high.shape))
    clear = jnp.broadcast_to(k_low >= 0, some.shape)
    if mask.causal:
        some &= present_low <= q_high
        clear &= k_high <= q_low
    if mask.window is not None:
        some &= q_low - k_high < mask.window
        clear &= q_high - k_low < mask.window
    if mask.q_segment_ids is not None:
        q_segment = _per_row(mask.q_segment_ids, groups, rows)
        k_segment = _blocks(mask.kv_segment_ids, keys, -1)
        some_, clear_ = _segments(q_segment, k_segment)
        some, clear = some & some_, clear & clear_
    return some, clear


def _segments(q: Array, k: Array) -> tuple[Array, Array]:
    """The same for segments [B, I, rows] and [B, J, keys]; negative ones are padding."""
    q_low = jnp.where(q < 0, _FAR, q).min(2)[:, :, None]
    k_low = jnp.where(k < 0, _FAR, k).min(2)[:, None, :]
    q_high, k_high = q.max(2)[:, :, None], k.max(2)[:, None, :]
    some = (k_low <= k_high) & (q_low <= q_high) & (k_low <= q_high) & (q_low <= k_high)
    one = (q.min(2)[:, :, None] == q_high) & (k.min(2)[:, None, :] == k_high)
    return some, one & (q_high == k_high) & (q_high >= 0)


def runs(some: Bool[Array, "B I J"], clear: Bool[Array, "B I J"]) -> Int[Array, "B I 4"]:
    """(low, high, clear_low, clear_high) along the last axis: all that is kept lies in
    [low, high), and [clear_low, clear_high) is the first run of clear tiles in it."""
    count = some.shape[-1]
    any_ = some.any(-1)
    low = jnp.where(any_, some.argmax(-1), 0)
    high = jnp.where(any_, count - some[..., ::-1].argmax(-1), 0)
    has = clear.any(-1)
    start = jnp.where(has, clear.argmax(-1), low)
    index = jnp.arange(count)
    broken = ~clear & (index >= start[..., None])
    stop = jnp.where(broken.any(-1), broken.argmax(-1), count)
    stop = jnp.where(has, stop, start)
    return jnp.stack([low, high, start, stop], -1).astype(jnp.int32)


def _per_row(x: Integers, groups: int, rows: int) -> Array:
    """[B, T] to [B, blocks, rows]: each token once for each head of its group."""
    x = jnp.repeat(jnp.asarray(x), groups, axis=1)
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % rows)), mode="edge")
    return x.reshape(x.shape[0], -1, rows)


def _blocks(x: Integers, size: int, fill: int) -> Array:
    """[B, S] to [B, blocks, size]; a last block that is not full is not clear."""
    x = jnp.pad(jnp.asarray(x), ((0, 0), (0, -x.shape[1] % size)), constant_values=fill)
    return x.reshape(x.shape[0], -1, size)
