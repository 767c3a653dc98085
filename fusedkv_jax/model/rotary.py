"""Rotary position embedding, half-split: channel c rotates with channel c + H/2."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache.calls import Rotation
from fusedkv_jax.config import RopeConfig


def frequencies(rope: RopeConfig, channels: int) -> np.ndarray:
    """Angle per position of each channel pair, scaled for long contexts.

    Returns:
        float64 [r / 2] for the r channels of a head that rotate, the first `rope.fraction` of them.
    """
    channels = rotated_channels(rope, channels)
    exponent = np.arange(0, channels, 2) / channels
    plain = rope.theta**-exponent
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "llama3":
        return _llama3(rope, plain)
    if rope.scaling == "yarn":
        return _yarn(rope, plain, channels)
    return plain


def rotated_channels(rope: RopeConfig, channels: int) -> int:
    """How many of a head's channels rotate."""
    return int(channels * rope.fraction)


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are slowed by `factor`, middle ones blended."""
    turns = rope.original_length * plain / (2 * math.pi)  # full turns within the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return plain * (blend + (1 - blend) / rope.factor)


def _yarn(rope: RopeConfig, plain: np.ndarray, channels: int) -> np.ndarray:
    """YaRN's "NTK by parts": channels that rotate often are kept, slow ones interpolated."""

    def channel_of(turns: float) -> float:
        wavelengths = rope.original_length / (turns * 2 * math.pi)
        return channels * math.log(wavelengths) / (2 * math.log(rope.theta))

    low = max(math.floor(channel_of(rope.beta_fast)), 0)
    high = min(math.ceil(channel_of(rope.beta_slow)), channels - 1)
    ramp = np.clip((np.arange(channels // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return plain * ((1 - ramp) + ramp / rope.factor)


def magnitude(rope: RopeConfig) -> float:
    """What YaRN multiplies cos and sin by (its attention temperature)."""
    if rope.scaling != "yarn":
        return 1.0
    return yarn_temperature(rope.factor, rope.mscale) / yarn_temperature(
        rope.factor, rope.mscale_all_dim
    )


def yarn_temperature(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1 (arXiv 2309.00071, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotation(rope: RopeConfig | None, channels: int, positions: Int[Array, "B T"]) -> Rotation:
    """Cosines and sines of each token's angles, float32 [B, T, r / 2]; without a rope, none."""
    if rope is None:
        shape = (*positions.shape, channels // 2)
        return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(
        frequencies(rope, channels), jnp.float32
    )
    scale = magnitude(rope)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def extra_rotation(rope: RopeConfig, channels: int, shift: Int[Array, "B"]) -> Rotation:
    """What rotates queries `shift` positions further: cosines and sines, [B, 1, channels / 2]."""
    angles = shift[:, None, None].astype(jnp.float32) * jnp.asarray(
        frequencies(rope, channels), jnp.float32
    )
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], angles: Rotation) -> Float[Array, "B T N H"]:
    """Rotate every head of every token by its position's angles, in float32.

    With fewer angles than channel pairs the channels after them stay as they are.
    """
    cos, sin = (part[:, :, None, :] for part in angles)
    rotating = 2 * cos.shape[-1]
    if rotating < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :rotating], angles), x[..., rotating:]], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
