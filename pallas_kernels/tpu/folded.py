"""Folding: the sources side by side are one source of J * H channels.

    scores  [a_0 q, a_1 q] . [K_0, K_1]      output  b_0 (P V_0) + b_1 (P V_1)

One product over J * H channels is free where that is no wider than the matrix unit. Gradients of
the weights come from the queries and from the outputs; only the attention inside is a kernel.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels import linear
from pallas_kernels.devices import Chip
from pallas_kernels.masks import Mask
from pallas_kernels.sources import MixedSources, Result, Source, as_array
from pallas_kernels.tpu import attend
from pallas_kernels.tpu.how import How


def _fold(side: Sequence[Source], weights: Array | None, chip: Chip) -> bool:
    """Several sources, together no wider than the matrix unit."""
    return weights is not None and len(side) * side[0].shape[3] <= chip.matrix


def folded(how: How, q: Array, sources: MixedSources, mask: Mask) -> Result:
    """(out, lse) by the tile kernel, on whichever side folds; arguments as of `attend.tiled`."""
    keys, values, key_weights, value_weights = sources
    dtype = q.dtype
    folded_values = None
    if _fold(keys, key_weights, how.chip):
        q = _side_by_side(linear.fold_queries(q, key_weights)).astype(dtype)
        keys, key_weights = _beside(keys), None
    if _fold(values, value_weights, how.chip):
        values, folded_values, value_weights = _beside(values), value_weights, None
    sources = MixedSources(keys, values, key_weights, value_weights)
    found: Any = attend.tiled(how, q, sources, mask)
    out, lse = found
    if folded_values is not None:
        out = linear.fold_outputs(_apart(out, folded_values.shape[0]), folded_values).astype(dtype)
    return out, lse


def _beside(side: Sequence[Source]) -> tuple[Array]:
    return (jnp.concatenate([as_array(x) for x in side], axis=-1),)


def _side_by_side(parts: Array) -> Array:
    """[B, J, T, N, H] to [B, T, N, J * H]."""
    parts = jnp.moveaxis(parts, 1, 3)
    return parts.reshape(*parts.shape[:3], -1)


def _apart(wide: Array, sources: int) -> Array:
    """The inverse of `_side_by_side`, in fp32."""
    wide = wide.astype(jnp.float32).reshape(*wide.shape[:3], sources, -1)
    return jnp.moveaxis(wide, 3, 1)
