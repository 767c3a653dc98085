"""Attention on NVIDIA GPUs by Triton kernels: mixed on the tile, or folded where queries are few.

Nothing here imports triton before a kernel is launched.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import linear, masks
from pallas_kernels.gpu import calls, operands
from pallas_kernels.gpu.device import GpuTarget, current
from pallas_kernels.gpu.lengths import Paging, lengths
from pallas_kernels.masks import Mask
from pallas_kernels.paged import Pages
from pallas_kernels.phases import DECODE, phase
from pallas_kernels.quantized import is_quantized
from pallas_kernels.sources import MixedSources, Result, Source

_Residuals = tuple[Array, MixedSources, Mask, Array, Array]  # q, sources, mask, out, lse

_DTYPES = ("bfloat16", "float16", "float32")


def attention(
    q: Array,
    keys: Sequence[Source],
    values: Sequence[Source],
    key_weights: Array | None,
    value_weights: Array | None,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    device: GpuTarget | None = None,
) -> Result:
    """Attention as `pallas_kernels.attention` says; residuals are its arguments, out and lse.

    Args:
      device: the GPU to compile for; by default this machine's.

    Raises:
      NotImplementedError: no GPU, a missing package, or a call that the kernels do not serve.
    """
    device = current() if device is None else device
    _check(q)
    sources = MixedSources(keys, values, key_weights, value_weights)
    if is_quantized((*keys, *values)):
        return _forward(device, scale, softcap, q, sources, mask)[0]
    _sides(q, sources)  # looked at before tracing, so that "auto" hears of a refusal
    return _attend(device, scale, softcap, q, sources, mask)


def paged_attention(
    q: Array,
    pages: Pages,
    page_table: Array,
    kv_lengths: Array,
    key_weights: Array | None,
    value_weights: Array | None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    device: GpuTarget | None = None,
) -> Result:
    """Attention over pages as `pallas_kernels.paged_attention` says; no gradients.

    Args:
      device: the GPU to compile for; by default this machine's.

    Raises:
      NotImplementedError: no GPU, a missing package, or a call that the kernels do not serve.
    """
    device = current() if device is None else device
    _check(q)
    keys, values = operands.paged(pages, key_weights, value_weights)
    paging = Paging(table=page_table, size=pages.page_size)
    mask = Mask(causal=True, window=window, kv_lengths=kv_lengths)
    return _run(device, q, keys, values, mask, paging, scale, softcap)


def _check(q: Array) -> None:
    if str(q.dtype) not in _DTYPES:
        raise NotImplementedError(f"{q.dtype} queries; served are {', '.join(_DTYPES)}")


def _sides(q: Array, sources: MixedSources) -> tuple[operands.Sources, operands.Sources]:
    keys, values, key_weights, value_weights = sources
    return (
        operands.contiguous(keys, key_weights, q.dtype),
        operands.contiguous(values, value_weights, q.dtype),
    )


def _run(
    device: GpuTarget,
    q: Array,
    keys: operands.Sources,
    values: operands.Sources,
    mask: Mask,
    paging: Paging | None,
    scale: float,
    softcap: float | None,
) -> Result:
    """(out, lse) by the kernel for this many queries."""
    stored = {str(x.dtype) for x in (*keys.arrays, *values.arrays)}
    needed = 89 if "float8_e4m3fn" in stored else 80
    if device.compute_capability < needed:
        raise NotImplementedError(
            f"{', '.join(sorted(stored))} sources need compute capability {needed / 10}; "
            f"{device.kind} has {device.compute_capability / 10}"
        )
    shape = lengths(q, keys, paging)
    decodes = phase(shape.rows, shape.queries, shape.keys) == DECODE
    # The split kernel has no segments, which only whole sequences have.
    kernel = calls.decode if decodes and mask.q_segment_ids is None else calls.forward
    return kernel(device, q, keys, values, mask, paging, scale=scale, softcap=softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    device: GpuTarget,
    scale: float,
    softcap: float | None,
    q: Array,
    sources: MixedSources,
    mask: Mask,
) -> Result:
    return _forward(device, scale, softcap, q, sources, mask)[0]


def _forward(
    device: GpuTarget,
    scale: float,
    softcap: float | None,
    q: Array,
    sources: MixedSources,
    mask: Mask,
) -> tuple[Result, _Residuals]:
    keys, values = _sides(q, sources)
    out, lse = _run(device, q, keys, values, mask, None, scale, softcap)
    return (out, lse), (q, sources, mask, out, lse)


def _backward(
    device: GpuTarget,
    scale: float,
    softcap: float | None,
    residuals: _Residuals,
    cotangents: Result,
) -> tuple[Array, MixedSources, None]:
    q, sources, mask, out, lse = residuals
    dout, lse, delta = linear.statistics(out, lse, cotangents, jnp.inf)  # exp(x - inf) = 0
    keys, values = _sides(q, sources)
    dq, dkey, dvalue = calls.backward(
        device, q, keys, values, mask, lse, dout, delta, scale=scale, softcap=softcap
    )
    present = None
    if mask.ragged:
        present = masks.key_positions(mask, dkey.shape[1]) >= 0
        present = jnp.asarray(present)[:, :, None, None]
    dkeys, dkey_weights = linear.unmix(dkey, sources.keys, sources.key_weights, present)
    dvalues, dvalue_weights = linear.unmix(dvalue, sources.values, sources.value_weights, present)
    return dq, MixedSources(dkeys, dvalues, dkey_weights, dvalue_weights), None


_attend.defvjp(_forward, _backward)
