"""Matrix products of tokens with parameters, with gradients in the order that is fast."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fusedkv_jax.trees import Leaf


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale"]
)
@dataclass(frozen=True)
class LowRank:
    """A matrix and a change of low rank, base + scale * a b, in place of a parameter's array.

    Neither the sum nor a gradient of its size is ever computed (LoRA, arXiv 2106.09685).

    Attributes:
        base: the matrix, [inputs, outputs] of any number of axes each.
        a: [inputs, rank].
        b: [rank, outputs].
        scale: of their product.
    """

    base: Leaf
    a: Leaf
    b: Leaf
    scale: float

    def __getitem__(self, key: object) -> LowRank:
        """Itself: modules read all of a parameter, `parameter[...]`."""
        return self


def project(
    x: Float[Array, "..."],
    weight: Float[Array, "..."] | LowRank,
    axes: int = 1,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """Contract the last `axes` axes of tokens with the first ones of a parameter.

    JAX's own rule gives the parameter's gradient transposed, and XLA on CPU then transposes
    the activations that enter it. Asking for x^T dy takes 0.8 of the time, forward and backward
    (SwiGLU, 512 tokens, D = 512, F = 1408, fp32).

    Args:
        x: tokens.
        weight: parameter. It is cast to the type of `x`; its gradient, which devices add up, has
            its own type and is rounded once.
        axes: number of axes to contract.
        dtype: of the sums and the result, by default that of `x`.
    """
    if isinstance(weight, LowRank):
        change = _project(_project(x, weight.a, axes, dtype), weight.b, 1, dtype)
        return _project(x, weight.base, axes, dtype) + weight.scale * change
    return _project(x, weight, axes, dtype)


def _product(x: Array, weight: Array, axes: int, dtype: DTypeLike | None) -> Array:
    weight = weight.astype(x.dtype)
    inner = tuple(range(x.ndim - axes, x.ndim))
    dims = ((inner, tuple(range(axes))), ((), ()))
    return lax.dot_general(x, weight, dims, preferred_element_type=dtype)


def _forward(
    x: Array, weight: Array, axes: int, dtype: DTypeLike | None
) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, weight, axes, dtype), (x, weight)


def _backward(
    axes: int, dtype: DTypeLike | None, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, weight = residuals
    batch = tuple(range(x.ndim - axes))
    outer = tuple(range(len(batch), gradient.ndim)), tuple(range(axes, weight.ndim))
    dx = lax.dot_general(
        gradient, weight.astype(x.dtype), (outer, ((), ())), preferred_element_type=dtype
    )
    wide = jnp.promote_types(x.dtype, weight.dtype)
    dweight = lax.dot_general(x, gradient, ((batch, batch), ((), ())), preferred_element_type=wide)
    return dx.astype(x.dtype), dweight.astype(weight.dtype)


_project = jax.custom_vjp(_product, nondiff_argnums=(2, 3))
_project.defvjp(_forward, _backward)
