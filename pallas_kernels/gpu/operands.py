"""What kernels get: sources, their scales and weights, and the numbers that describe them."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.paged_stream import PagedStream
from pallas_kernels.pages import Pages
from pallas_kernels.quantized import Quantized
from pallas_kernels.sources import Source, as_array

MOST = 4  # sources of keys, and of values, that the kernels have arguments for
_STORED = ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn", "float8_e5m2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """One side, keys or values, as a kernel reads it.

    Attributes:
      arrays: J arrays whose rows (the last axis) hold one token and head.
      scales: J arrays alike with its scale, or empty.
      weights: float32 [J, K, H], or None.
      size: H.
      stride: numbers from one row to the next.
      scale_stride: alike for scales.
    """

    arrays: tuple[Array, ...]
    scales: tuple[Array, ...]
    weights: Array | None
    size: int
    stride: int
    scale_stride: int

    @property
    def stored(self) -> int:
        """Bytes of a number."""
        return self.arrays[0].dtype.itemsize

    @property
    def padded(self) -> int:
        """The head size that tiles have: a power of two."""
        return padded(self.size)


def padded(size: int) -> int:
    """The next power of two, at least 16, which is the least that a matrix product takes."""
    return max(16, 1 << (size - 1).bit_length())


def contiguous(sources: Sequence[Source], weights: Array | None, dtype: np.dtype) -> Sources:
    """A side of `attention`: arrays [B, S, K, H], or `Quantized` with a scale a token and head.

    Raises:
      NotImplementedError: quantized in groups, which no kernel reads.
    """
    arrays, scales = [], []
    for source in sources:
        if isinstance(source, Quantized):
            if not source.per_token or source.bits != 8:
                raise NotImplementedError(
                    "the kernels read 8-bit sources with one scale a token and head, no groups"
                )
            arrays.append(source.data)
            scales.append(source.scale.astype(jnp.float32))
        else:
            # Wider sources carry gradients in float32, not values; XLA merges the casts.
            array = as_array(source)
            wide = array.dtype.itemsize > dtype.itemsize
            arrays.append(array.astype(dtype) if wide else array)
    if scales and len(scales) < len(arrays):
        raise NotImplementedError("the kernels read sources that are all quantized, or none")
    size = arrays[0].shape[-1]
    return _checked(
        Sources(
            arrays=tuple(arrays),
            scales=tuple(scales),
            weights=_wide(weights),
            size=size,
            stride=size,
            scale_stride=1,
        )
    )


def paged(
    pages: Pages, key_weights: Array | None, value_weights: Array | None
) -> tuple[Sources, Sources]:
    """Both sides of `paged_attention`: slices of one record, which the kernels cut themselves."""
    streams, result, start = pages.num_keys + pages.num_values, [], 0
    for num, size, weights in (
        (pages.num_keys, pages.key_size, key_weights),
        (pages.num_values, pages.value_size, value_weights),
    ):
        side = Sources(
            arrays=(pages.data,) * num,
            scales=() if pages.scales is None else (pages.scales,) * num,
            weights=_wide(weights),
            size=size,
            stride=pages.data.shape[-1],
            scale_stride=streams,
        )
        result.append(_checked(side))
        start += num * size
    return result[0], result[1]


def pooled(streams: Sequence[PagedStream], weights: Array | None) -> Sources:
    """A side of `ragged_attention`: pools, of which the kernel finds the slots.

    Raises:
      NotImplementedError: some streams are in 8 bits, and others are not; or scales are padded.
    """
    if any(
        x.scale.shape[2:] != (1, x.page_size * x.shape[2]) for x in streams if x.scale is not None
    ):
        raise NotImplementedError("the kernels read scales of all heads in one group, not padded")
    scales = tuple(x.scale.astype(jnp.float32) for x in streams if x.scale is not None)
    if scales and len(scales) < len(streams):
        raise NotImplementedError("the kernels read sources that are all quantized, or none")
    size = streams[0].head_size
    return _checked(
        Sources(
            # Tiles of a page follow each other: a kernel that counts tokens sees none.
            arrays=tuple(x.data.reshape(*x.data.shape[:2], x.page_size, -1) for x in streams),
            scales=scales,
            weights=_wide(weights),
            size=size,
            stride=size,
            scale_stride=1,
        )
    )


def pointers(
    keys: Sources, values: Sources, num_heads: int, dtype: np.dtype, unused: Array, scaled: bool
) -> tuple[Array, ...]:
    """The arguments that come first in every kernel after q: weights, arrays, and scales."""
    sides = (keys, values)
    weights = [
        jnp.ones((1, num_heads, x.size), jnp.float32) if x.weights is None else x.weights
        for x in sides
    ]
    fill = lambda x: (*x, *(x[:1] or (unused,)) * (MOST - len(x)))[:MOST]  # noqa: E731
    arrays = [y for x in sides for y in fill(x.arrays)]
    scales = [y for x in sides for y in fill(x.scales)] if scaled else []
    return *weights, *arrays, *scales


def _wide(weights: Array | None) -> Array | None:
    return None if weights is None else weights.astype(jnp.float32)


def _checked(side: Sources) -> Sources:
    if len(side.arrays) > MOST:
        raise NotImplementedError(f"{len(side.arrays)} sources; the kernels mix at most {MOST}")
    if side.size > 256:
        raise NotImplementedError(f"head size {side.size}; the kernels hold at most 256")
    dtypes = {str(x.dtype) for x in side.arrays}
    if len(dtypes) > 1:
        raise NotImplementedError(f"sources of types {', '.join(sorted(dtypes))}; one is served")
    if not dtypes <= set(_STORED):
        raise NotImplementedError(f"{dtypes.pop()} sources; served are {', '.join(_STORED)}")
    return side
