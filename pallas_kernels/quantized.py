"""Keys and values stored in 8 or 4 bits: codes with scales, one affine format for all.

A stored number is `scale * code + zero`. Tokens and channels share a scale in groups whose sizes
follow from the shapes, so per-token scales (8-bit caches) and KIVI's per-channel scales of keys
(arXiv 2402.02750) are the same class.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

EIGHT_BIT = ("int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz")
FORMATS = (*EIGHT_BIT, "int4")


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A [B, S, K, H] array in 8 or 4 bits; more leading axes are allowed.

    Attributes:
      data: codes, [B, S, K, H] of int8 or an 8-bit float; or two 4-bit codes (0 to 15) a byte,
        uint8 [B, S, K, H/2]: byte i holds channel i in its low half, channel i + H/2 in its high.
      scale: float [B, S/gt, K, H/gc]; gt tokens and gc channels share a scale.
      zero: the number that code 0 stands for, like `scale`; None for zero.
    """

    # Any, as jax also fills trees with tracers, shapes and placeholders.
    data: Any
    scale: Any
    zero: Any = None

    @property
    def bits(self) -> int:
        """Bits of a code, 8 or 4."""
        return 4 if self.data.dtype == jnp.uint8 else 8

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers that are stored."""
        *rest, size = self.data.shape
        return (*rest, size * 8 // self.bits)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.data.ndim

    @property
    def token_group(self) -> int:
        """Tokens that share a scale."""
        return self.shape[-3] // max(1, self.scale.shape[-3])

    @property
    def channel_group(self) -> int:
        """Channels that share a scale."""
        return self.shape[-1] // max(1, self.scale.shape[-1])

    @property
    def per_token(self) -> bool:
        """One scale for each token and head and no zero, so that scores can take the scale."""
        return self.token_group == 1 and self.scale.shape[-1] == 1 and self.zero is None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def codes(self, dtype: Any = jnp.float32) -> Float[Array, "*B S K H"]:
        """The codes as numbers of `dtype`, unpacked."""
        if self.bits == 8:
            return self.data.astype(dtype)
        # Half and half: neighbors in a byte would have to be interleaved, a shuffle per channel.
        return jnp.concatenate([self.data & 15, self.data >> 4], axis=-1).astype(dtype)

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "*B S K H"]:
        """The numbers, computed in float32 and rounded once to `dtype`."""
        numbers = self._grouped(self.codes()) * self._per_group(self.scale)
        if self.zero is not None:
            numbers = numbers + self._per_group(self.zero)
        return numbers.reshape(self.shape).astype(dtype)

    def tokens(self, start: Any, size: int) -> "Quantized":
        """`size` tokens from `start`, which may be traced; both multiples of the token group."""
        group = self.token_group

        def cut(x: Array, step: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start // step, size // step, axis=x.ndim - 3)

        zero = None if self.zero is None else cut(self.zero, group)
        return Quantized(cut(self.data, 1), cut(self.scale, group), zero)

    def check_present(self, name: str) -> None:
        """Raises ValueError, naming the argument, where codes or scales are no such arrays."""
        for part in ("data", "scale"):
            if getattr(getattr(self, part), "ndim", 0) < 3:
                raise ValueError(f"{name}.{part} is no array [B, S, K, ...]; quantize() makes both")

    def check(self, name: str) -> None:
        """Raises ValueError, naming the argument, where the arrays do not fit each other."""
        self.check_present(name)
        known = (*EIGHT_BIT, "uint8")
        if str(self.data.dtype) not in known:
            raise ValueError(
                f"{name}.data is {self.data.dtype}; it must be one of {', '.join(known)}"
            )
        if not jnp.issubdtype(self.scale.dtype, jnp.floating):
            raise ValueError(f"{name}.scale is {self.scale.dtype}; it must be a float array")
        *batch, length, heads, size = self.shape
        *rest, groups, scale_heads, channels = self.scale.shape
        fits = (rest, scale_heads) == (batch, heads) and groups > 0 and channels > 0
        if not fits or length % groups or size % channels:
            raise ValueError(
                f"{name}.scale has shape {self.scale.shape}; for {self.shape} it must be "
                "[B, S/gt, K, H/gc] with whole groups"
            )
        if self.zero is not None and self.zero.shape != self.scale.shape:
            raise ValueError(
                f"{name}.zero has shape {self.zero.shape}; it must be that of scale, "
                f"{self.scale.shape}"
            )

    def _grouped(self, x: Array) -> Array:
        *batch, length, heads, size = self.shape
        groups, channels = self.scale.shape[-3], self.scale.shape[-1]
        return x.reshape(
            *batch, groups, length // groups, heads, channels, size // channels
        )  # [B, S/gt, gt, K, H/gc, gc]

    def _per_group(self, x: Array) -> Array:
        return jnp.expand_dims(x.astype(jnp.float32), (x.ndim - 2, x.ndim + 1))


jax.tree_util.register_dataclass(Quantized, ["data", "scale", "zero"], [])


def quantize(
    x: Float[Array, "*B S K H"],
    dtype: str = "int8",
    token_group: int = 1,
    channel_group: int | None = None,
    *,
    scale_dtype: Any = jnp.float32,
) -> Quantized:
    """Store an array in 8 bits (symmetric) or in 4 bits (with a zero point).

    Every group gets the scale that just holds its largest number (8 bits), or its smallest and
    its largest (4 bits). int8 and int4 are off by at most half a scale.

    Args:
      x: what to store.
      dtype: "int8", "int4", "float8_e4m3fn", "float8_e5m2" or "float8_e4m3b11fnuz".
      token_group: tokens that share a scale; divides S.
      channel_group: channels that share a scale; divides H. None: all of a head.
      scale_dtype: float type of scales and zeros.

    Raises:
      ValueError: an unknown dtype, or groups that do not divide the axis.
    """
    if getattr(x, "ndim", 0) < 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        what = f"{x.dtype} of shape {x.shape}" if hasattr(x, "shape") else type(x).__name__
        raise ValueError(f"x is {what}; it must be a float [..., S, K, H]")
    if not jnp.issubdtype(scale_dtype, jnp.floating):
        raise ValueError(f"scale_dtype is {scale_dtype}; it must be a float type")
    *batch, length, heads, size = x.shape
    channel_group = size if channel_group is None else channel_group
    _check_groups(dtype, x.shape, token_group, channel_group)
    groups = x.astype(jnp.float32).reshape(
        *batch, length // token_group, token_group, heads, size // channel_group, channel_group
    )
    axes = (-4, -1)
    if dtype == "int4":
        zero = groups.min(axes, keepdims=True).astype(scale_dtype)
        span = groups.max(axes, keepdims=True) - zero.astype(jnp.float32)
        scale = _positive(span / 15).astype(scale_dtype)
        codes = (groups - zero.astype(jnp.float32)) / scale.astype(jnp.float32)
        codes = jnp.clip(jnp.round(codes), 0, 15).astype(jnp.uint8).reshape(x.shape)
        low, high = jnp.split(codes, 2, axis=-1)
        return Quantized(low | high << 4, scale.squeeze(axes), zero.squeeze(axes))
    kind = jnp.dtype(dtype)
    top = 127.0 if dtype == "int8" else float(jnp.finfo(kind).max)
    scale = _positive(jnp.abs(groups).max(axes, keepdims=True) / top).astype(scale_dtype)
    codes = jnp.clip(groups / scale.astype(jnp.float32), -top, top)
    codes = (jnp.round(codes) if dtype == "int8" else codes).astype(kind)
    return Quantized(codes.reshape(x.shape), scale.squeeze(axes))


def is_quantized(sources: Any) -> bool:
    """Whether any source of a tuple is stored quantized."""
    return any(isinstance(x, Quantized) for x in sources)


def token_group(sources: Any) -> int:
    """Tokens that must be cut together: a multiple of every source's token group."""
    return math.lcm(*(x.token_group for x in sources if isinstance(x, Quantized)))


def _positive(scale: Array) -> Array:
    """A group of equal numbers (all zero for 8 bits) has range 0: any scale will do."""
    return jnp.where(scale == 0, 1.0, scale)


def _check_groups(dtype: str, shape: tuple[int, ...], token_group: int, channel_group: int) -> None:
    if dtype not in FORMATS:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(FORMATS)}")
    length, size = shape[-3], shape[-1]
    for name, group, axis, count in (
        ("token_group", token_group, "S", length),
        ("channel_group", channel_group, "H", size),
    ):
        whole = isinstance(group, (int, np.integer)) and not isinstance(group, bool)
        if not whole or group < 1 or count % group:
            raise ValueError(f"{name} is {group}; it must divide {axis} = {count}")
    if dtype == "int4" and size % 2:
        raise ValueError(f"x has H = {size}; int4 packs two channels a byte and needs an even H")
