"""A stream of a cache that is read where it lies: the stacked array of all streams, and a slot."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.paged_stream import PagedStream
from pallas_kernels.quantized import Quantized


@dataclasses.dataclass(frozen=True)
class Stacked:
    """One [B, S, K, H] source in an array that holds P of them.

    Who reads tile by tile takes the array as it is and finds the slot: nothing is cut out before
    the call. Whoever needs an array of one source calls `read`.

    Attributes:
      data: [P, B, S, K * H] or [P, B, S, K, H], float or 8-bit codes. TPU kernels read the first;
        a reshape of one into the other beside an update makes XLA on CPUs copy the array.
      slot: which of the P; an int or an int32 scalar, which may be traced.
      head_size: H.
      scale: of 8-bit codes, float [P, B, S, K]; else None.
    """

    # Any, as jax also fills trees with tracers, shapes and placeholders.
    data: Any
    slot: Any
    head_size: int
    scale: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [B, S, K, H] of the source."""
        _, batch, length, *token = self.data.shape
        return (batch, length, math.prod(token) // self.head_size, self.head_size)

    @property
    def ndim(self) -> int:
        """Number of the source's axes."""
        return 4

    @property
    def dtype(self) -> Any:
        """Type of the numbers or codes."""
        return self.data.dtype

    def read(self) -> Float[Array, "B S K H"] | Quantized:
        """The source alone."""
        data = self._cut(self.data).reshape(self.shape)
        return data if self.scale is None else Quantized(data, self._cut(self.scale)[..., None])

    def tokens(self, start: int | Array, size: int) -> Float[Array, "B size K H"] | Quantized:
        """`size` tokens of each row from `start`, which may be traced."""

        def cut(x: Array) -> Array:
            sizes = (1, x.shape[1], size, *x.shape[3:])
            starts = (self.slot, 0, start, *(0,) * (x.ndim - 3))
            starts = tuple(jnp.asarray(i, jnp.int32) for i in starts)  # of one type, as it must be
            return jax.lax.dynamic_slice(x, starts, sizes)[0]

        data = cut(self.data).reshape(self.shape[0], size, *self.shape[2:])
        return data if self.scale is None else Quantized(data, cut(self.scale)[..., None])

    def check_present(self, name: str) -> None:
        """Raises ValueError, naming the argument, where the data is no such array."""
        if getattr(self.data, "ndim", 0) not in (4, 5):
            raise ValueError(f"{name}.data is no array [P, B, S, K * H] or [P, B, S, K, H]")

    def check(self, name: str) -> None:
        """Raises ValueError, naming the argument, where the arrays do not fit each other."""
        last, size = self.data.shape[-1], self.head_size
        apart = self.data.ndim == 5
        if self.data.ndim not in (4, 5) or size < 1 or (last != size if apart else last % size):
            raise ValueError(
                f"{name}.data has shape {self.data.shape}; it must be [P, B, S, K * H] or "
                f"[P, B, S, K, H] with H = {size}"
            )
        expected = (*self.data.shape[:3], self.shape[2])
        if self.scale is not None and self.scale.shape != expected:
            raise ValueError(
                f"{name}.scale has shape {self.scale.shape}; it must be [P, B, S, K] = {expected}"
            )

        if isinstance(self.slot, int) and not 0 <= self.slot < self.data.shape[0]:
            raise ValueError(f"{name}.slot is {self.slot}; data has {self.data.shape[0]} slots")
        if self.scale is None and not jnp.issubdtype(self.data.dtype, jnp.floating):
            raise ValueError(f"{name}.scale is None; codes of {self.data.dtype} need one")

    def _cut(self, array: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(array, self.slot, keepdims=False)


jax.tree_util.register_dataclass(Stacked, ["data", "slot", "scale"], ["head_size"])


def is_stacked(sources: Any) -> bool:
    """Whether any source of a tuple lies in a stacked array."""
    return any(isinstance(x, Stacked) for x in sources)


def read(sources: Any, kept: Any = ()) -> tuple[Any, ...]:
    """The sources as arrays or `Quantized`; those of the types `kept` as they are."""
    stored = (Stacked, PagedStream)
    return tuple(
        x.read() if isinstance(x, stored) and not isinstance(x, kept) else x for x in sources
    )
