"""The parts of a layer that do not touch the cache: RMSNorm and the SwiGLU feed-forward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fusedkv_jax.model.parameters import Initializer
from fusedkv_jax.model.projection import project


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, init: Initializer, size: int):
        self.scale = init.scale(size)
        self.eps = init.config.norm_eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps)
        return (normed * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class SwiGLU(nnx.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, init: Initializer):
        width, hidden = init.config.d_model, init.config.d_ff
        self.gate = init.matrix(width, hidden)
        self.up = init.matrix(width, hidden)
        self.down = init.matrix(hidden, width)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up, down = (w[...] for w in (self.gate, self.up, self.down))
        return project(jax.nn.silu(project(x, gate)) * project(x, up), down)
