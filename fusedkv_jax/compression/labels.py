"""Double Sparsity's label cache: a few channels of every key, in 4 bits, to score tokens with."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache.storage import Slot
from fusedkv_jax.trees import Leaf

SCALE_TYPE = jnp.float16


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "zero", "channels"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Labels:
    """Channels of keys as `scale * code + zero`; the token is the last axis, as scores run over it.

    Attributes:
        codes: uint8 [P, B, K, c / 2, S]: channel i of the c in the low half of byte i, channel
            i + c / 2 in its high half.
        scale: float16 [P, B, K, S].
        zero: float16 [P, B, K, S].
        channels: which channels of a key, int32 [P, B, K, c].
    """

    codes: Leaf
    scale: Leaf
    zero: Leaf
    channels: Leaf

    @classmethod
    def of(cls, keys: Float[Array, "P B S K H"], channels: Int[Array, "P B K c"]) -> Labels:
        """Labels of all tokens of some streams."""
        chosen = jnp.take_along_axis(keys, channels[:, :, None], axis=4)
        codes, scale, zero = encode_labels(jnp.moveaxis(chosen, 2, 4))
        return cls(codes, scale, zero, channels)

    def write(
        self,
        slot: Slot,
        new: Float[Array, "B T K H"],
        start: Int[Array, "B"],
        count: Int[Array, "B"],
    ) -> Labels:
        """The labels after new tokens of one stream."""
        chosen = jnp.take_along_axis(new, self.channels[slot][:, None], axis=3)
        parts = encode_labels(jnp.moveaxis(chosen, 1, 3))
        batch, length = new.shape[:2]
        step = jnp.arange(length)
        place = jnp.where(step < count[:, None], start[:, None] + step, self.scale.shape[-1])
        rows = jnp.arange(batch)[:, None]

        def put(array: Array, part: Array) -> Array:
            part = jnp.moveaxis(part, -1, 1)  # [B, T, K, ...]
            return array.at[slot, rows, ..., place].set(part, mode="drop")

        codes, scale, zero = map(put, (self.codes, self.scale, self.zero), parts)
        return Labels(codes, scale, zero, self.channels)

    def select(self, slot: Slot) -> Labels:
        """Those of one stream, without the first axis."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, slot, keepdims=False), self)


def encode_labels(x: Float[Array, "*B c S"]) -> tuple[Array, Array, Array]:
    """Codes uint8 [..., c / 2, S] of 4 bits each, scale and zero [..., S]: asymmetric per token."""
    x = x.astype(jnp.float32)
    zero = x.min(-2).astype(SCALE_TYPE)
    span = x.max(-2) - zero.astype(jnp.float32)
    scale = jnp.where(span > 0, span / 15, 1).astype(SCALE_TYPE)
    wide = (x - zero.astype(jnp.float32)[..., None, :]) / scale.astype(jnp.float32)[..., None, :]
    codes = jnp.clip(jnp.round(wide), 0, 15).astype(jnp.uint8)
    low, high = jnp.split(codes, 2, axis=-2)
    return low | high << 4, scale, zero


def label_scores(labels: Labels, q: Float[Array, "B N H"]) -> Float[Array, "B K S"]:
    """Scores of all tokens of one stream, the mean over the query heads of each KV head.

    Scores are linear in the queries, so their mean is the score of the mean query.

    Args:
        labels: of one stream, as `Labels.select` gives them.
        q: one query per row.
    """
    heads, count = labels.channels.shape[1:]
    mean = q.astype(jnp.float32).reshape(q.shape[0], heads, -1, q.shape[-1]).mean(2)
    mean = jnp.take_along_axis(mean, labels.channels, axis=2) / count**0.5  # [B, K, c]
    low, high = jnp.split(mean[..., None], 2, axis=2)
    # Byte by byte, so that the sum runs along the tokens: 16x faster on a CPU than a reduction.
    total = jnp.zeros((), jnp.float32)
    for i in range(count // 2):
        codes = labels.codes[:, :, i].astype(jnp.int32)
        total += (codes & 15).astype(jnp.float32) * low[:, :, i]
        total += (codes >> 4).astype(jnp.float32) * high[:, :, i]
    zero = labels.zero.astype(jnp.float32) * mean.sum(-1, keepdims=True)
    return labels.scale.astype(jnp.float32) * total + zero
