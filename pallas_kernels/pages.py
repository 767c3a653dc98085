"""The pages of a cache: what they hold, and how tokens get into them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.quantized import EIGHT_BIT, quantize


@dataclasses.dataclass(frozen=True)
class Pages:
    """Keys and values of all streams that some layers read, in pages of tokens.

    A record holds everything that a reader of several streams needs of one token and head, so
    that one copy of a page brings it.

    Attributes:
      data: [pages, K, page_size, J*H + J'*H'], the J keys, then the J' values of a token.
      scales: None, or for 8-bit data float32 [pages, K, page_size, J + J'].
      num_keys: J.
      num_values: J'.
      key_size: H.
      value_size: H'.
    """

    data: Any
    scales: Any
    num_keys: int
    num_values: int
    key_size: int
    value_size: int

    @classmethod
    def create(
        cls,
        *,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        num_keys: int,
        num_values: int,
        key_size: int,
        value_size: int,
        dtype: Any = jnp.bfloat16,
    ) -> "Pages":
        """Empty pages of a float dtype, or of an 8-bit one with scales."""
        sizes = {
            "num_pages": num_pages,
            "page_size": page_size,
            "num_kv_heads": num_kv_heads,
            "num_keys": num_keys,
            "num_values": num_values,
            "key_size": key_size,
            "value_size": value_size,
        }
        for name, size in sizes.items():
            whole = isinstance(size, (int, np.integer)) and not isinstance(size, bool)
            if not whole or size < 1:
                raise ValueError(f"{name} is {size}; it must be a whole number of at least 1")
        width = num_keys * key_size + num_values * value_size
        lead = (num_pages, num_kv_heads, page_size)
        _check_stored("dtype", dtype)
        scales = None
        if jnp.dtype(dtype).itemsize == 1:
            scales = jnp.zeros((*lead, num_keys + num_values), jnp.float32)
        data = jnp.zeros((*lead, width), dtype)
        return cls(data, scales, num_keys, num_values, key_size, value_size)

    @property
    def num_pages(self) -> int:
        """Number of pages."""
        return self.data.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.data.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.data.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def spans(self) -> tuple[tuple[int, int], ...]:
        """Where each stream lies in a record, (start, stop): the keys, then the values."""
        sizes = [self.key_size] * self.num_keys + [self.value_size] * self.num_values
        stops = np.cumsum(sizes).tolist()
        return tuple((stop - size, stop) for size, stop in zip(sizes, stops, strict=True))

    def write(
        self,
        keys: Sequence[Float[Array, "B T K H"] | None],
        values: Sequence[Float[Array, "B T K H2"] | None],
        page_table: Int[Array, "B max_pages"],
        positions: Int[Array, "B T"],
    ) -> "Pages":
        """The pages with new tokens in them.

        Args:
          keys: one array for each of the J keys; None leaves that stream as it is, for layers
            that own one stream of the record.
          values: alike, J'.
          page_table: page of each row's tokens; see `paged_attention`. Rows may share pages, but
            of two tokens for one slot either may stay.
          positions: position of each token; negative ones are not written.

        A token past its row's table, or whose entry is no page (-1, say), is dropped; where table
        and positions are not traced it is an error.

        Raises:
          ValueError: the streams are not those of the pages, or a token has no page.
        """
        streams = (*keys, *values)
        if (len(keys), len(values)) != (self.num_keys, self.num_values):
            raise ValueError(
                f"keys and values have {len(keys)} and {len(values)} streams; these pages hold "
                f"{self.num_keys} and {self.num_values}"
            )
        self._check_streams(keys, values, page_table, positions)
        self._check_write(page_table, positions)
        pages, slots = self._places(page_table, positions)
        # Heads are indexed, not sliced: with a slice between two indices a TPU turns all pages
        # round, and back, for every write.
        at = (pages[..., None], jnp.arange(self.num_kv_heads), slots[..., None])
        data, scales = self.data, self.scales
        for i, (stream, (start, stop)) in enumerate(zip(streams, self.spans(), strict=True)):
            if stream is None:
                continue
            if scales is not None:
                stored = quantize(stream, str(data.dtype))
                scales = scales.at[(*at, i)].set(stored.scale[..., 0], mode="drop")
                stream = stored.data
            new = stream.astype(data.dtype)
            data = data.at[(*at, slice(start, stop))].set(new, mode="drop")
        return dataclasses.replace(self, data=data, scales=scales)

    def _places(self, page_table: Array, positions: Array) -> tuple[Array, Array]:
        """Page and slot [B, T] of each token; a page past the last where it has none."""
        index = positions // self.page_size
        inside = (index >= 0) & (index < page_table.shape[1])
        pages = jnp.take_along_axis(page_table, jnp.where(inside, index, 0), axis=1)
        # Beyond the pages a write is dropped, while a negative index would count from the end.
        pages = jnp.where(inside & (pages >= 0), pages, self.num_pages)
        return pages, positions % self.page_size

    def _check_streams(
        self,
        keys: Sequence[Array | None],
        values: Sequence[Array | None],
        page_table: Array,
        positions: Array,
    ) -> None:
        """Refuses arrays that are not of the shapes of the pages, the table or each other."""
        for name, array in (("page_table", page_table), ("positions", positions)):
            shape, dtype = jnp.shape(array), getattr(array, "dtype", None)
            if len(shape) != 2 or dtype is None or not jnp.issubdtype(dtype, jnp.integer):
                raise ValueError(f"{name} is {dtype} of shape {shape}; it must be int32 [B, ...]")
        if page_table.shape[0] != positions.shape[0]:
            raise ValueError(
                f"page_table has {page_table.shape[0]} rows; positions have {positions.shape[0]}"
            )
        lead = (*positions.shape, self.num_kv_heads)
        for name, streams, size in (
            ("keys", keys, self.key_size),
            ("values", values, self.value_size),
        ):
            for i, stream in enumerate(streams):
                if stream is not None and jnp.shape(stream) != (*lead, size):
                    raise ValueError(
                        f"{name}[{i}] has shape {jnp.shape(stream)}; it must be {(*lead, size)}"
                    )

    def _check_write(self, page_table: Array, positions: Array) -> None:
        """Refuses tokens without a page, where tokens and table are known."""
        if isinstance(positions, Tracer) or isinstance(page_table, Tracer):
            return
        table, known = np.asarray(page_table), np.asarray(positions)
        held = table.shape[1] * self.page_size
        if known.size and known.max() >= held:
            raise ValueError(
                f"positions reach {known.max()}; page_table has room for 0 to {held - 1} "
                f"({table.shape[1]} pages of {self.page_size}); give -1 to tokens to leave out"
            )
        index = np.maximum(known, 0) // self.page_size
        pages = np.where(known >= 0, np.take_along_axis(table, index, axis=1), 0)
        bad = pages[(pages < 0) | (pages >= self.num_pages)]
        if bad.size:
            raise ValueError(
                f"page_table gives page {bad[0]} to a token; pages has 0 to {self.num_pages - 1}"
            )

    def check(self) -> None:
        """Raises ValueError where the arrays do not fit each other."""
        width = self.num_keys * self.key_size + self.num_values * self.value_size
        if self.data.ndim != 4 or self.data.shape[3] != width:
            raise ValueError(
                f"pages.data has shape {self.data.shape}; it must be [pages, K, page_size, {width}]"
            )
        _check_stored("pages.data", self.data.dtype)
        eight = str(self.data.dtype) in EIGHT_BIT
        if eight != (self.scales is not None):
            need = "needs scales" if eight else "takes no scales"
            raise ValueError(f"pages.scales is {self.scales}; {self.data.dtype} data {need}")
        expected = (*self.data.shape[:3], self.num_keys + self.num_values)
        if self.scales is not None and self.scales.shape != expected:
            raise ValueError(f"pages.scales has shape {self.scales.shape}; it must be {expected}")


def _check_stored(name: str, dtype: DTypeLike | None) -> None:
    """Pages hold floats of 16 bits and more as they are, and numbers of 8 bits with scales."""
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = None
    wide = found is not None and found.itemsize > 1 and jnp.issubdtype(found, jnp.floating)
    if not wide and str(found) not in EIGHT_BIT:
        raise ValueError(
            f"{name} is {dtype}; it must be a float type or one of {', '.join(EIGHT_BIT)}"
        )


jax.tree_util.register_dataclass(
    Pages, ["data", "scales"], ["num_keys", "num_values", "key_size", "value_size"]
)
