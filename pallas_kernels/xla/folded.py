"""Several sources as one of J times the head size: for accelerators without a kernel.

(sum_j a_j K_j) q = [K_1 .. K_J] [a_1 q .. a_J q], and the values alike: P [V_1 .. V_J], whose parts
are weighted and added. A matrix unit that is J * H channels wide does this in the time of H, and
nothing is mixed tile by tile.
"""

import jax.numpy as jnp

from pallas_kernels import xla
from pallas_kernels.quantized import is_quantized


def attention(q, keys, values, key_weights, value_weights, mask, *, scale, softcap):
    """Arguments and result as in `reference.attention`.

    Raises:
      NotImplementedError: a source is `Quantized`; side by side the codes would need one scale.
    """
    if is_quantized((*keys, *values)):
        raise NotImplementedError("Quantized sources cannot lie side by side; use 'xla'")
    groups = q.shape[2] // keys[0].shape[2]
    if key_weights is not None:
        weights = jnp.repeat(key_weights.astype(jnp.float32), groups, axis=1)  # [J, N, H]
        q = jnp.concatenate([(w * q).astype(q.dtype) for w in weights], axis=-1)
    key = jnp.concatenate(keys, axis=-1)
    value = jnp.concatenate(values, axis=-1)
    out, lse = xla.attention(q, (key,), (value,), None, None, mask, scale=scale, softcap=softcap)
    if value_weights is None:
        return out, lse
    weights = jnp.repeat(value_weights.astype(jnp.float32), groups, axis=1)
    parts = jnp.split(out, len(values), axis=-1)
    total = sum(w * part.astype(jnp.float32) for w, part in zip(weights, parts, strict=True))
    return jnp.asarray(total).astype(q.dtype), lse
