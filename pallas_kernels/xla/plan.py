"""How much of a call is computed at once: block sizes and the rule that picks them."""

import dataclasses
import math

from pallas_kernels.masks import Mask
from pallas_kernels.phases import DECODE, phase

SCORE_BYTES = 2**20
TILE_BYTES = 2**21  # of keys in float32 that decoding reads at once, of all rows
# "decode" multiplies FLOPs by the number of KV heads, so it bounds the rows of all heads, T * N.
DECODE_ROWS = 64
PAGED_TILE = 128  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """What is computed at once.

    Attributes:
      schedule: "rows", "blocks" or "decode", the module that runs the forward pass.
      batch: rows of the batch; divides B.
      queries: positions of a block of queries.
      keys: keys of a tile; "rows" gives each block of queries all its keys in one softmax.
    """

    schedule: str
    batch: int
    queries: int
    keys: int

    @classmethod
    def choose(
        cls, q_shape: tuple[int, ...], key_shape: tuple[int, ...], mask: Mask
    ) -> "BlockPlan":
        """Blocks for the forward pass of q [B, T, N, H] and keys [B, S, K, H].

        Tiles of about a MiB of scores stay in the cache between the product that writes them
        and the one that reads them; larger ones pay for memory, and for fresh pages, at every
        step: one [B, N, T, S] computation took 2.1x as long (forward and backward, T = 512).
        """
        batch, length, heads, _ = q_shape
        if _decodes(q_shape, key_shape):
            keys = _decode_tile(key_shape)
            return cls(schedule="decode", batch=batch, queries=length, keys=keys)
        return cls.choose_backward(q_shape, key_shape, mask)

    @classmethod
    def choose_paged(cls, q_shape: tuple[int, ...], key_shape: tuple[int, ...]) -> "BlockPlan":
        """Blocks for keys in pages, of which a tile is gathered at a time.

        Tables are as wide as the longest request that may come, and only tiles that somebody
        reaches are gathered. Tiles of 128 instead of 512 tokens took 0.4 to 0.7 of a whole
        step's time for 1 to 8 decoding rows of 32 to 100 tokens, 0.5 to 0.8 for chunks of 32 tokens
        at up to 250, and 0.96 to 1.07 for full tables of 512 and 4,096 tokens (medians, demo
        preset, two busy CPU cores).
        """
        few = _decodes(q_shape, key_shape)
        return cls(
            schedule="decode" if few else "blocks",
            batch=q_shape[0],
            queries=q_shape[1] if few else min(q_shape[1], 128),
            keys=min(key_shape[1], PAGED_TILE),
        )

    def fit(self, group: int, quantized: bool) -> "BlockPlan":
        """Tiles of whole groups of tokens, which are stored together.

        Codes become numbers tile by tile, and these should still be in the cache when they are
        multiplied: decoding from int8 took 0.7 to 0.8 of the time with tiles of 256 instead of
        1024 keys, and 0.5 to 0.9 of what fp32 takes (H = 64, K = 4, two busy CPU cores).
        """
        keys = min(self.keys, 256) if quantized and self.schedule == "decode" else self.keys
        return dataclasses.replace(self, keys=max(group, keys // group * group))

    @classmethod
    def choose_backward(
        cls, q_shape: tuple[int, ...], key_shape: tuple[int, ...], mask: Mask
    ) -> "BlockPlan":
        """Blocks for the backward pass, which "decode" does not have."""
        batch, length, heads, _ = q_shape
        num_keys = key_shape[1]
        # "rows" mixes all keys at once: not for more than a few thousand.
        short = max(length, num_keys) <= 2048 if mask.aligned else length * num_keys <= 2**18
        if short:
            # A quarter of T: with causal self-attention 10/16 of the square is computed.
            schedule, keys = "rows", num_keys
            queries = min(length, max(32, min(128, -(-length // 4 // 32) * 32)))
        else:
            schedule, keys, queries = "blocks", min(num_keys, 256), min(length, 128)
        chunk = max(1, min(batch, SCORE_BYTES // (heads * queries * keys * 4)))
        while batch % chunk:
            chunk -= 1
        return cls(schedule=schedule, batch=chunk, queries=queries, keys=keys)


def _decode_tile(key_shape: tuple[int, ...]) -> int:
    """Tokens of keys [B, S, K, H] that decoding reads at once: what a processor's cache holds.

    Tiles of 1 to 2 MiB took 0.5 to 0.75 of the time of 8 MiB (8 rows of 1,100 and 4,096 tokens, 2
    of 4,096 with K * H = 1,024, 32 of 1,024; two busy CPU cores).
    """
    batch, num_keys, heads, size = key_shape
    token = batch * heads * size * 4
    if num_keys * token <= 2 * TILE_BYTES:
        return num_keys
    return min(num_keys, max(128, min(1024, 2 ** int(math.log2(max(1, TILE_BYTES // token))))))


def _decodes(q_shape: tuple[int, ...], key_shape: tuple[int, ...]) -> bool:
    """The call is one of decoding, and few enough rows for its schedule."""
    _, length, heads, _ = q_shape
    _, keys, kv_heads, _ = key_shape
    waits = phase(length * heads // kv_heads, length, keys) == DECODE
    return waits and length * heads <= DECODE_ROWS
