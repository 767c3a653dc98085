"""Matrix products of tokens with parameters, with gradients in the order that is fast."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def project(
    x: Float[Array, "..."],
    weight: Float[Array, "..."],
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
