"""Several sources as one of J times the head size: for accelerators without a kernel.

(sum_j a_j K_j) q = [K_1 .. K_J] [a_1 q .. a_J q], and the values alike: P [V_1 .. V_J], whose parts
are weighted and added. A matrix unit that is J * H channels wide does this in the time of H, and
nothing is mixed tile by tile.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import linear, xla
from pallas_kernels.call import AttentionCall, RaggedAttentionCall
from pallas_kernels.quantized import is_quantized
from pallas_kernels.sources import MixedSources, Result, as_array
from pallas_kernels.xla import ragged


def attention(call: AttentionCall) -> Result:
    """Result as of `reference.attention`.

    Raises:
      NotImplementedError: a source is `Quantized`; side by side the codes would need one scale.
    """
    keys, values, key_weights, value_weights = call.sources
    if is_quantized((*keys, *values)):
        raise NotImplementedError("Quantized sources cannot lie side by side; use 'xla'")
    q = call.q
    if key_weights is not None:
        q = jnp.moveaxis(linear.fold_queries(q, key_weights), 1, 3)  # [B, T, N, J, H]
        q = q.reshape(*q.shape[:3], -1).astype(call.q.dtype)
    key = jnp.concatenate([as_array(x) for x in keys], axis=-1)
    value = jnp.concatenate([as_array(x) for x in values], axis=-1)
    sources = MixedSources((key,), (value,), None, None)
    out, lse = xla.attention(dataclasses.replace(call, q=q, sources=sources))
    if value_weights is None:
        return out, lse
    parts = jnp.stack(jnp.split(out.astype(jnp.float32), len(values), axis=-1), axis=1)
    return linear.fold_outputs(parts, value_weights).astype(call.q.dtype), lse


def ragged_attention(call: RaggedAttentionCall) -> Result:
    """Attention of the queries of many rows over pages, as calls with equal rows."""
    return ragged.attention(call, attention)
