"""Low-rank adaptation: two thin matrices are trained beside each matrix, which stays as it is.

W [inputs, outputs] becomes W + scale * A B (LoRA, arXiv 2106.09685), with A [inputs, rank] normal
at first and B [rank, outputs] zero. In a state's parameters they lie beside W, whose name theirs
begin with; on a mesh every device has them whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array

from fusedkv_jax.model.projection import LowRank
from fusedkv_jax.sharding import PARAMETERS

Chosen = Callable[[tuple[Any, ...], object], bool]  # of a parameter's path and the parameter

_A, _B = "_lora_a", "_lora_b"
# Axes of inputs of what may be adapted: the matrices that tokens are multiplied with. MLA's
# expansion of latents is not among them, as decoding reads it in another way.
_INPUTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate", "up", "down"), 1),
    **dict.fromkeys(("q_a_proj", "kv_a_proj"), 1),
    "o_proj": 2,
}


@dataclasses.dataclass(frozen=True)
class Lora:
    """How a model is adapted.

    Attributes:
      rank: of the changes.
      scale: of them, LoRA's alpha / rank.
      chosen: the model's parameters that are; None for all matrices of layers.
    """

    rank: int
    scale: float
    chosen: Chosen | None = None

    def add(self, params: nnx.State, seed: ArrayLike) -> nnx.State:
        """A model's parameters and those of changes that are zero, drawn from `seed`."""
        found: list[tuple[tuple[Any, ...], nnx.Variable]] = []
        for number, (path, parameter) in enumerate(nnx.to_flat_state(params)):
            found.append((path, parameter))
            name = str(path[-1])
            if name not in _INPUTS or not (self.chosen is None or self.chosen(path, parameter)):
                continue
            stack, inputs, outputs = _axes(name, parameter[...].shape)
            key = jax.random.fold_in(jax.random.key(seed), number)
            a = jax.random.normal(key, (*stack, *inputs, self.rank), jnp.float32)
            a *= math.prod(inputs) ** -0.5
            b = jnp.zeros((*stack, self.rank, *outputs), jnp.float32)
            found += [
                ((*path[:-1], name + end), nnx.LoRAParam(array))
                for end, array in ((_A, a), (_B, b))
            ]
        return nnx.from_flat_state(found)

    def apply(self, params: nnx.State) -> nnx.State:
        """The model's parameters with their changes, kept apart, for whole sequences."""
        return self._joined(params, lambda name, base, a, b: LowRank(base, a, b, self.scale))

    def merge(self, params: nnx.State) -> nnx.State:
        """The model's parameters with their changes added, summed in float32."""

        def total(name: str, base: Array, a: Array, b: Array) -> Array:
            stack, inputs, outputs = (math.prod(axes) for axes in _axes(name, base.shape))
            a, b = a.reshape(stack, inputs, -1), b.reshape(stack, -1, outputs)
            change = (a @ b).reshape(base.shape)
            return (base.astype(jnp.float32) + self.scale * change).astype(base.dtype)

        return self._joined(params, total)

    def _joined(self, params: nnx.State, join: Callable[..., Array | LowRank]) -> nnx.State:
        """The model's parameters, those with a change as what `join` makes of both."""
        flat = dict(nnx.to_flat_state(params))
        found = []
        for path, parameter in flat.items():
            name = str(path[-1])
            if name.endswith((_A, _B)):
                continue
            a, b = (flat.get((*path[:-1], name + end)) for end in (_A, _B))
            if a is not None and b is not None:
                parameter = parameter.replace(join(name, parameter[...], a[...], b[...]))
            found.append((path, parameter))
        return nnx.from_flat_state(found)


def _axes(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Sizes of stacked layers, of inputs and of outputs of a matrix."""
    start = len(shape) - len(PARAMETERS[name])
    middle = start + _INPUTS[name]
    return shape[:start], shape[start:middle], shape[middle:]
