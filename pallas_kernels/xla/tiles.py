"""The arithmetic of one block of queries against one block of keys, shared by every schedule.

Arrays here are laid out [B, K, rows, H], rows = G queries of one KV head by T positions, G
outermost: one batched matrix product then serves a whole group and no key is repeated.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import masks
from pallas_kernels.masks import Mask

HIDDEN = float(-0.7 * jnp.finfo(jnp.float32).max)  # finite: -inf - -inf would be NaN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """How a score becomes a logit: softcap(scale * q.k), hidden where the mask says so."""

    scale: float
    softcap: float | None


class Cotangents(NamedTuple):
    """What the backward pass is given beside the chunk, of every row.

    Attributes:
      lse: [..., T, N], +large where a row sees nothing, so that its weights vanish.
      dout: [..., T, N, H'].
      delta: sum(out * dout) - dlse, [..., T, N].
    """

    lse: Array
    dout: Array
    delta: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Positions and segments of a block of queries or keys, [B or 1, block]."""

    positions: Any
    segment_ids: Any

    def __getitem__(self, index: int | slice | tuple) -> "Places":
        segments = None if self.segment_ids is None else self.segment_ids[index]
        return Places(self.positions[index], segments)


def places(mask: Mask, num_queries: int, num_keys: int) -> tuple[Places, Places]:
    """The places of all queries and of all keys."""
    queries = Places(masks.query_positions(mask, num_queries, num_keys), mask.q_segment_ids)
    return queries, Places(masks.key_positions(mask, num_keys), mask.kv_segment_ids)


def hide(mask: Mask, queries: Places, keys: Places, groups: int) -> Array | None:
    """Visibility of the rows, [B or 1, 1, G * T or 1, S], or None if all is visible."""
    seen = masks.visible(
        mask, queries.positions, keys.positions, queries.segment_ids, keys.segment_ids
    )
    if seen is None:
        return None
    batch, length, num_keys = seen.shape
    if length == 1:  # one query, or only absence matters: the same for every row
        return jnp.asarray(seen[:, None])
    seen = jnp.broadcast_to(seen[:, None], (batch, groups, length, num_keys))
    return seen.reshape(batch, 1, groups * length, num_keys)


def to_rows(x: Array, num_kv_heads: int) -> Array:
    """[B, T, N, H] to [B, K, G * T, H]."""
    batch, length, heads, size = x.shape
    groups = heads // num_kv_heads
    x = x.reshape(batch, length, num_kv_heads, groups, size).transpose(0, 2, 3, 1, 4)
    return x.reshape(batch, num_kv_heads, groups * length, size)


def from_rows(x: Array, groups: int) -> Array:
    """[B, K, G * T, H] to [B, T, N, H]."""
    batch, num_kv_heads, rows, size = x.shape
    x = x.reshape(batch, num_kv_heads, groups, rows // groups, size).transpose(0, 3, 1, 2, 4)
    return x.reshape(batch, rows // groups, num_kv_heads * groups, size)


def part(where: Places, start: int | Array, size: int) -> Places:
    """The places of `size` keys from `start`."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), where)


def product(x: Array, y: Array, contract_x: int, contract_y: int) -> Array:
    """Batched matrix product of two [B, K, ., .] arrays, accumulated in fp32."""
    dims = (((contract_x,), (contract_y,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def cap(how: Scores, score: Array) -> Array:
    """Scaled and soft-capped scores."""
    score = score * how.scale
    return score if how.softcap is None else how.softcap * jnp.tanh(score / how.softcap)


def logits(how: Scores, q: Array, key: Array, seen: Array | None) -> Array:
    """Logits of the rows of q [B, K, R, H] for key [B, K, S, H], HIDDEN where not seen."""
    score = cap(how, product(q, key, 3, 3))  # [B, K, R, S]
    return score if seen is None else jnp.where(seen, score, HIDDEN)


def finish(top: Array, total: Array, out: Array) -> tuple[Array, Array]:
    """Normalised output and lse from the running sums of a softmax; blind rows: 0 and -inf."""
    some = total > 0
    total = jnp.where(some, total, 1)
    return out / total, jnp.where(some, top + jnp.log(total), -jnp.inf)


def gradients(
    how: Scores,
    q: Array,
    key: Array,
    value: Array,
    seen: Array | None,
    rows: Cotangents,
) -> tuple[Array, Array, Array]:
    """Gradients of one block: dq [B, K, R, H], dkey [B, K, H, S], dvalue [B, K, H', S], fp32.

    The key gradients come transposed because the matrix library has no fast product that
    contracts the rows of its left operand: with the small operand there 2.1x as fast.
    """
    lse, dout, delta = rows
    score = logits(how, q, key, seen)
    weight = jnp.exp(score - lse[..., None])  # [B, K, R, S], normalised; hidden ones are 0
    dweight = product(dout, value, 3, 3)
    dscore = weight * (dweight - delta[..., None]) * how.scale
    if how.softcap is not None:
        # d cap*tanh(x/cap) = 1 - tanh^2; hidden scores are finite nonsense with weight 0.
        capped = score / how.softcap if seen is None else jnp.where(seen, score, 0) / how.softcap
        dscore = dscore * (1 - capped**2)
    dscore = dscore.astype(q.dtype)
    dq = product(dscore, key, 3, 2)
    dkey = product(q, dscore, 2, 2)
    dvalue = product(dout, weight.astype(dout.dtype), 2, 2)
    return dq, dkey, dvalue
