"""A store whose kernel reads it in place: all heads of a token together, [P, B, S, K * H].

On TPUs an array whose last axis is a head of 64, 80 or 96 channels is laid out with another axis in
the lanes and transposed for every kernel, and a stream cut out of [P, B, S, K, H] is a copy. Here
attention gets the whole array and a slot (`pallas_kernels.Stacked`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fusedkv_jax.cache.calls import Call, Source
from fusedkv_jax.cache.storage import Slot, write
from fusedkv_jax.cache.storage_types import FLOATS
from fusedkv_jax.cache.stores import IN_PLACE_TOKENS, LinearStore, Store, storage_of
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind
from fusedkv_jax.trees import Leaf
from pallas_kernels import Stacked, choice

LANES = 128  # of a TPU's vector unit: tokens fill whole ones


def suits(config: ModelConfig, dtype: str) -> bool:
    """Whether the device that is compiled for has a kernel which reads such a store in place."""
    widths = [heads * channels for heads, channels in config.stream_shapes.values()]
    return (
        choice.device()[0] == "tpu"
        and config.attention in ("auto", "tpu")
        and config.mla is None
        and dtype in FLOATS
        and not any(width % LANES for width in widths)
    )


def whole_tiles(tokens: int, dtype: str) -> int:
    """Room for so many tokens of a row, as whole tiles of a TPU's memory.

    A row that ends within a tile is laid out another way, and turned round for every kernel: up to
    15 tokens more for each row are nothing beside that.
    """
    tile = 32 // jnp.dtype(dtype).itemsize
    return tokens if tokens <= LANES else -(-tokens // tile) * tile


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=["heads"]
)
@dataclass(frozen=True)
class StackedStore(Store):
    """Tokens in order: position p sits in place p.

    Attributes:
        keys: storage [P, B, S, K * H].
        values: storage [P, B, S, K * H'].
        heads: K.
    """

    keys: Leaf
    values: Leaf
    heads: int

    rewinds: ClassVar[bool] = True

    @classmethod
    def of(cls, store: Store) -> StackedStore:
        """An uncompressed store with each token's heads together."""
        keys, values = (
            x.reshape(*x.shape[:3], -1) for x in map(functools.partial(storage_of, store), KINDS)
        )
        return cls(keys, values, storage_of(store, "key").shape[3])

    def apart(self) -> LinearStore:
        """The same tokens with the heads on an axis of their own."""
        return LinearStore(*(self._apart(storage_of(self, kind)) for kind in KINDS))

    def _apart(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def write(
        self, kind: Kind, slot: Slot, new: Float[Array, "B T K H"], call: Call
    ) -> StackedStore:
        storage = storage_of(self, kind)
        new = new.reshape(*new.shape[:2], -1).astype(storage.dtype)
        return self._with(kind, write(storage, slot, new, call.first, call.count, self.heads))

    def view(self, kind: Kind, slot: Slot, new: Array | None, call: Call) -> Source:
        storage = storage_of(self, kind)
        slot = jnp.asarray(slot, jnp.int32)
        source = Stacked(storage, slot, storage.shape[3] // self.heads)
        # Many queries transpose a stream anyway: cut it out once for all layers that read it.
        return source if call.length <= IN_PLACE_TOKENS else source.read()

    def token_shape(self, kind: Kind) -> tuple[int, int]:
        return (self.heads, storage_of(self, kind).shape[3] // self.heads)
