"""Which query sees which key: the integers of a call, and the rule that every backend applies.

A worked example, three keys in a cache of length four, two queries, `window=2`:

    key index        0   1   2   3          kv_lengths = 3: key 3 is absent
    query 0 (at 1)   x   x   .   .          queries are the last two of the three valid tokens
    query 1 (at 2)   .   x   x   .          2 - 0 is not < 2, so key 0 has left the window
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

Integers = Array | np.ndarray  # NumPy where the numbers are known while tracing

ABSENT = -1  # position of a key that is not there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """The mask of a call as integers; never a [T, S] array.

    Attributes:
      causal: keys after the query are hidden.
      window: a query sees itself and the `window - 1` positions before it; None sees all.
      q_positions: [B, T], or None for the last T of the valid positions.
      kv_positions: [B, S], negative = absent, or None for the key's index.
      q_segment_ids, kv_segment_ids: [B, T] and [B, S], negative = padding, or both None.
      kv_lengths: [B], keys from this index on are absent, or None for all present.
    """

    causal: bool
    window: int | None = None
    # Any, as jax also fills trees with tangents and placeholders.
    q_positions: Any = None
    kv_positions: Any = None
    q_segment_ids: Any = None
    kv_segment_ids: Any = None
    kv_lengths: Any = None

    @property
    def aligned(self) -> bool:
        """Positions are known when tracing: key s at s, query t at S - T + t."""
        return self.q_positions is None and self.kv_positions is None and self.kv_lengths is None

    @property
    def ragged(self) -> bool:
        """Some keys may be absent, so what lies in their memory must not be trusted."""
        return self.kv_positions is not None or self.kv_lengths is not None


jax.tree_util.register_dataclass(
    Mask,
    data_fields=[
        "q_positions", "kv_positions", "q_segment_ids", "kv_segment_ids", "kv_lengths"
    ],
    meta_fields=["causal", "window"],
)  # fmt: skip


def query_positions(mask: Mask, num_queries: int, num_keys: int) -> Int[Integers, "b T"]:
    """Positions of the queries, [B, T], or [1, T] where all rows agree."""
    if mask.q_positions is not None:
        return mask.q_positions
    # NumPy on purpose: with static alignment the positions stay constants of the program.
    steps = np.arange(num_queries, dtype=np.int32)[None] - num_queries
    return steps + (num_keys if mask.kv_lengths is None else mask.kv_lengths[:, None])


def key_positions(mask: Mask, num_keys: int) -> Int[Integers, "b S"]:
    """Positions of the keys, [B, S] or [1, S], with ABSENT for every key that is not there."""
    index = np.arange(num_keys, dtype=np.int32)[None]
    positions = index if mask.kv_positions is None else mask.kv_positions
    if mask.kv_lengths is None:
        return positions
    return jnp.where(index < mask.kv_lengths[:, None], positions, ABSENT)


def visible(
    mask: Mask,
    q_positions: Int[Integers, "_ T"],
    kv_positions: Int[Integers, "_ S"],
    q_segment_ids: Int[Integers, "B T"] | None,
    kv_segment_ids: Int[Integers, "B S"] | None,
) -> Integers | None:
    """The rule, for any block: bool [B or 1, T or 1, S], or None if none is hidden."""
    rules = []
    queries, keys = q_positions[:, :, None], kv_positions[:, None, :]
    if mask.ragged:
        rules.append(keys >= 0)
    if mask.causal:
        rules.append(keys <= queries)
    if mask.window is not None:
        rules.append(queries - keys < mask.window)
    if q_segment_ids is not None and kv_segment_ids is not None:
        same = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
        rules.append(same & (kv_segment_ids[:, None, :] >= 0))
    if not rules:
        return None
    result = rules[0]
    for rule in rules[1:]:
        result = result & rule
    return result
