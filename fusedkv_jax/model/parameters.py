"""Parameter types, which say how the optimizer treats an array, and how arrays start."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

from fusedkv_jax.config import ModelConfig

Param = TypeVar("Param", bound=nnx.Param)


class NoDecayParam(nnx.Param):
    """A parameter without weight decay: norm scales and biases."""


class FusionWeight(NoDecayParam):
    """A learned weight of the stream algebra; float32 and without weight decay."""


# Parameters are drawn together, in groups of at most this many numbers: compiling the generator
# is what an initialization costs, and one shape less to compile saves about as long as 10 million
# numbers take.
_GROUP = 1 << 26


@dataclass(frozen=True)
class _Draw:
    """A parameter that still has to be drawn."""

    parameter: nnx.Param
    shape: tuple[int, ...]
    std: float
    dtype: str
    finish: Callable[[Array], Array] | None


@dataclass(frozen=True)
class Initializer:
    """Makes the parameters of a module; `fill` draws them once all are made.

    Attributes:
        config: sets their type and scale.
        stack: leading axes of every matrix and scale: the repeats of a scanned layer, or none.
    """

    config: ModelConfig
    stack: tuple[int, ...] = ()
    pending: list[_Draw] = field(default_factory=list)

    def matrix(self, *shape: int) -> nnx.Param:
        """A projection, normal with the configuration's standard deviation."""
        shape = (*self.stack, *shape)
        return self.normal(nnx.Param, shape, self.config.init_std, self.config.param_dtype)

    def scale(self, size: int, value: float = 1.0) -> NoDecayParam:
        """A norm's scale, ones or another value."""
        return NoDecayParam(jnp.full((*self.stack, size), value, self.config.param_dtype))

    def bias(self, *shape: int) -> NoDecayParam:
        """A bias, zeros."""
        return NoDecayParam(jnp.zeros((*self.stack, *shape), self.config.param_dtype))

    def normal(
        self,
        kind: type[Param],
        shape: tuple[int, ...],
        std: float,
        dtype: str,
        finish: Callable[[Array], Array] | None = None,
    ) -> Param:
        """A normal parameter; `finish` is applied to what was drawn."""
        parameter = kind(jax.ShapeDtypeStruct(shape, dtype))
        self.pending.append(_Draw(parameter, shape, std, dtype, finish))
        return parameter

    def fill(self, rngs: nnx.Rngs) -> None:
        """Draw all parameters, in the order in which they were made."""
        groups: list[list[_Draw]] = []
        size = _GROUP
        for draw in self.pending:
            size += math.prod(draw.shape)
            if size > _GROUP:
                groups.append([])
                size = math.prod(draw.shape)
            groups[-1].append(draw)
        for group in groups:
            specs = tuple((draw.shape, draw.std, draw.dtype) for draw in group)
            for draw, value in zip(group, _normals(rngs.params(), specs), strict=True):
                draw.parameter.set_value(draw.finish(value) if draw.finish else value)
        self.pending.clear()


@functools.partial(jax.jit, static_argnums=1)
def _normals(key: Array, specs: tuple[tuple[tuple[int, ...], float, str], ...]) -> list[Array]:
    sizes = np.cumsum([math.prod(shape) for shape, _, _ in specs])
    parts = jnp.split(jax.random.normal(key, (int(sizes[-1]),), jnp.float32), sizes[:-1])
    return [
        (std * part.reshape(shape)).astype(dtype)
        for part, (shape, std, dtype) in zip(parts, specs, strict=True)
    ]


def weight_decay_mask(params: PyTree) -> PyTree:
    """True where weight decay applies: everything but norm scales, biases and fusion weights.

    Args:
        params: an `nnx.State` of parameters, as from `nnx.split(model, nnx.Param)`.

    Returns:
        The same tree with a bool in place of every parameter.
    """
    return jax.tree.map(
        lambda variable: not isinstance(variable, NoDecayParam),
        params,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
