"""cuDNN's attention on keys and values that are mixed first, one layer's at a time in memory.

The price is writing and reading the mixed K^ and V^ once a layer; the kernel is the fastest there
is on NVIDIA GPUs. With one source nothing is mixed. "auto" does not take it: what it serves, whole
causal sequences, is neither training on packed text (segments) nor prefill into a cache (lengths).
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import linear
from pallas_kernels.call import AttentionCall
from pallas_kernels.quantized import is_quantized


def attention(call: AttentionCall) -> tuple[Array, None]:
    """Output as of `reference.attention`; None in place of the lse.

    Raises:
      NotImplementedError: what cuDNN does not compute, or not by the rules of `attention`.
    """
    reason = _refusal(call)
    if reason:
        raise NotImplementedError(f"cuDNN is not used: {reason}")
    q, mask = call.q, call.mask
    keys, values, key_weights, value_weights = call.sources
    out = jax.nn.dot_product_attention(
        q,
        linear.mix(keys, key_weights, q.dtype),
        linear.mix(values, value_weights, q.dtype),
        is_causal=mask.causal,
        scale=call.scale,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="cudnn",
    )
    return out, None


def _refusal(call: AttentionCall) -> str:
    """Why the call cannot go to cuDNN; empty if it can."""
    q, mask, (keys, values, *_) = call.q, call.mask, call.sources
    length, num_keys = q.shape[1], keys[0].shape[1]
    size, value_size = keys[0].shape[3], values[0].shape[3]
    if is_quantized((*keys, *values)):
        return "Quantized sources would be written out whole"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, and q is {q.dtype}"
    if size != value_size or size % 8 or size > 128:
        return f"head sizes {size} and {value_size} are not equal multiples of 8 up to 128"
    if not mask.aligned or mask.q_segment_ids is not None:
        return "positions, lengths and segments would need a bias of [T, S] numbers"
    if mask.causal and length != num_keys:
        return f"it aligns {length} queries with the first of {num_keys} keys, not with the last"
    if mask.window is not None and not mask.causal:
        return "it has no one-sided window without causality"
    return "softcap is not in it" if call.softcap is not None else ""
