"""What attention reads, tile by tile: arrays of all tokens, or pages."""

import dataclasses
import math
from typing import Any

import jax
from jax import Array, lax

from pallas_kernels.paged_stream import PagedStream
from pallas_kernels.quantized import Quantized, token_group
from pallas_kernels.sources import Source
from pallas_kernels.stacked import Stacked

# Some tokens of the keys and of the values, tuples of [B, size, K, H].
Tiles = tuple[tuple[Array | Quantized, ...], tuple[Array | Quantized, ...]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ArraySources:
    """Tuples of key and value sources, each [B, S, K, H] or a record of `pallas_kernels`."""

    keys: Any
    values: Any

    @property
    def length(self) -> int:
        """Keys of a row, absent ones included."""
        return self.keys[0].shape[1]

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.keys[0].shape[2]

    @property
    def value_size(self) -> int:
        """Head size of the values."""
        return self.values[0].shape[3]

    @property
    def group(self) -> int:
        """Tiles start and end at multiples of this."""
        sources = (*self.keys, *self.values)
        return math.lcm(token_group(sources), *(x.page_size for x in sources if _in_pages(x)))

    @property
    def quantized(self) -> bool:
        """Codes become numbers tile by tile."""
        sources = (*self.keys, *self.values)
        return any(
            isinstance(x, Quantized) or getattr(x, "scale", None) is not None for x in sources
        )

    def tile(self, start: int | Array, size: int) -> Tiles:
        """Keys and values of `size` tokens from `start`, tuples of [B, size, K, H]."""

        def cut(x: Source) -> Array | Quantized:
            if isinstance(x, PagedStream | Stacked):
                return x.tokens(start, size)
            if size == self.length:
                return x
            if isinstance(x, Quantized):
                return x.tokens(start, size)
            return lax.dynamic_slice_in_dim(x, start, size, axis=1)

        return tuple(map(cut, self.keys)), tuple(map(cut, self.values))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedSources:
    """The same of `Pages` and the pages [B, max_pages] of each row, gathered tile by tile."""

    pages: Any
    table: Any

    @property
    def length(self) -> int:
        """Keys of a row, absent ones included."""
        return self.table.shape[1] * self.pages.page_size

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.pages.num_kv_heads

    @property
    def value_size(self) -> int:
        """Head size of the values."""
        return self.pages.value_size

    @property
    def group(self) -> int:
        """Tiles start and end at multiples of this."""
        return self.pages.page_size

    @property
    def quantized(self) -> bool:
        """Codes become numbers tile by tile."""
        return self.pages.scales is not None

    def tile(self, start: int | Array, size: int) -> Tiles:
        """Keys and values of `size` tokens from `start`, tuples of [B, size, K, H]."""
        step = self.pages.page_size
        ids = lax.dynamic_slice_in_dim(self.table, start // step, size // step, axis=1)

        def rows(x: Array) -> Array:  # [pages, K, page_size, .] to [B, size, K, .]
            x = x[ids].swapaxes(2, 3)
            return x.reshape(ids.shape[0], size, *x.shape[3:])

        data = rows(self.pages.data)
        streams = [data[..., low:high] for low, high in self.pages.spans()]
        if self.pages.scales is not None:
            scales = rows(self.pages.scales)
            streams = [Quantized(x, scales[..., i : i + 1]) for i, x in enumerate(streams)]
        return tuple(streams[: self.pages.num_keys]), tuple(streams[self.pages.num_keys :])


def _in_pages(source: Source) -> bool:
    return isinstance(source, PagedStream)


Streams = ArraySources | PagedSources
Weighted = tuple[Streams, Array | None, Array | None]  # and weights of the keys and values
