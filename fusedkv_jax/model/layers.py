"""The parts of a layer that do not touch the cache: norms and the feed-forward."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fusedkv_jax.model.parameters import Initializer
from fusedkv_jax.model.projection import project


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32 (arXiv 1910.07467).

    With `norm="rms_plus_one"` the stored scale is what is added to one (Gemma).
    """

    def __init__(self, init: Initializer, size: int):
        self.offset = 1.0 if init.config.block.norm == "rms_plus_one" else 0.0
        self.scale = init.scale(size, 1.0 - self.offset)
        self.eps = init.config.norm_eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return (normed * (scale + self.offset if self.offset else scale)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Norm over the last axis with mean and bias, computed in float32 (arXiv 1607.06450)."""

    def __init__(self, init: Initializer, size: int):
        self.scale = init.scale(size)
        self.bias = init.bias(size)
        self.eps = init.config.norm_eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(jnp.float32)
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centered * centered, axis=-1, keepdims=True)
        normed = centered * jax.lax.rsqrt(variance + self.eps)
        scale, bias = (part[...].astype(jnp.float32) for part in (self.scale, self.bias))
        return (normed * scale + bias).astype(x.dtype)


Norm = RMSNorm | LayerNorm


def make_norm(init: Initializer, size: int) -> Norm:
    """The norm that the configuration names."""
    return (LayerNorm if init.config.block.norm == "layer" else RMSNorm)(init, size)


_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class FeedForward(nnx.Module):
    """down(act(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202), or down(act(up(x))) without a gate."""

    def __init__(self, init: Initializer):
        block = init.config.block
        width, hidden = init.config.d_model, init.config.d_ff
        self.activation = block.activation
        self.gate = init.matrix(width, hidden) if block.gated else None
        self.up = init.matrix(width, hidden)
        self.down = init.matrix(hidden, width)
        biased = block.mlp_bias
        self.gate_bias = init.bias(hidden) if biased and block.gated else None
        self.up_bias = init.bias(hidden) if biased else None
        self.down_bias = init.bias(width) if biased else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return add_bias(project(self.hidden(x), self.down[...]), self.down_bias)

    def hidden(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """What enters the last matrix."""
        activate = _ACTIVATIONS[self.activation]
        up = add_bias(project(x, self.up[...]), self.up_bias)
        if self.gate is None:
            return activate(up)
        return activate(add_bias(project(x, self.gate[...]), self.gate_bias)) * up


def add_bias(x: Float[Array, "..."], bias: nnx.Param | None) -> Float[Array, "..."]:
    """`x`, plus the bias if there is one."""
    return x if bias is None else x + bias[...].astype(x.dtype)
