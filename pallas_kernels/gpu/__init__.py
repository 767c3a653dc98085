"""Attention on NVIDIA GPUs by Triton kernels: mixed on the tile, or folded where queries are few.

Nothing here imports triton before a kernel is launched.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import linear, masks
from pallas_kernels.call import AttentionCall, PagedAttentionCall, RaggedAttentionCall
from pallas_kernels.gpu import calls, operands, split_calls
from pallas_kernels.gpu.device import GpuTarget, current
from pallas_kernels.gpu.inputs import Inputs, Paging
from pallas_kernels.masks import Mask
from pallas_kernels.phases import DECODE, phase
from pallas_kernels.quantized import is_quantized
from pallas_kernels.sources import MixedSources, Result, named

Residuals = tuple[AttentionCall, Array, Array]  # and out and lse

_MOST_GROUPS = 64  # query heads of a KV head, all of which a block of queries has
_DTYPES = ("bfloat16", "float16", "float32")


def attention(call: AttentionCall, *, device: GpuTarget | None = None) -> Result:
    """Attention as `pallas_kernels.attention` says; residuals are the call, out and lse.

    Args:
      device: the GPU to compile for; by default this machine's.

    Raises:
      NotImplementedError: no GPU, a missing package, or a call that the kernels do not serve.
    """
    device = current() if device is None else device
    inputs = inputs_of(call)  # before tracing, so that "auto" hears of a refusal
    if is_quantized((*call.sources.keys, *call.sources.values)):
        return _run(device, inputs)
    return _attend(device, call)


def paged_attention(call: PagedAttentionCall, *, device: GpuTarget | None = None) -> Result:
    """Attention over pages as `pallas_kernels.paged_attention` says; no gradients.

    Args:
      device: the GPU to compile for; by default this machine's.

    Raises:
      NotImplementedError: no GPU, a missing package, or a call that the kernels do not serve.
    """
    device = current() if device is None else device
    _check(call.q)
    keys, values = operands.paged(call.pages, call.key_weights, call.value_weights)
    inputs = Inputs(
        q=call.q,
        keys=keys,
        values=values,
        mask=call.mask,
        scale=call.scale,
        softcap=call.softcap,
        paging=Paging(table=call.page_table, size=call.pages.page_size),
    )
    return _run(device, inputs)


def ragged_attention(
    call: RaggedAttentionCall, *, device: GpuTarget | None = None
) -> tuple[Array, Array]:
    """Attention of chunks and single tokens as `pallas_kernels.ragged_attention` says.

    Args:
      device: the GPU to compile for; by default this machine's.

    Raises:
      NotImplementedError: no GPU, a missing package, or a call that the kernel does not serve.
    """
    device = current() if device is None else device
    _check(call.q)
    keys, values, key_weights, value_weights = call.sources
    num_pages, size = keys[0].data.shape[1], keys[0].page_size
    pools = {(x.data.shape[1], x.page_size) for x in (*keys, *values)}
    if len(pools) > 1:
        raise NotImplementedError(f"pools of {pools} pages and tokens; the kernel reads one form")
    paging = Paging(
        table=jnp.clip(keys[0].table, 0, num_pages - 1).astype(jnp.int32),
        size=size,
        slots=jnp.stack([jnp.asarray(x.slot, jnp.int32) for x in (*keys, *values)]),
        pool=num_pages * size,
    )
    inputs = Inputs(
        q=call.q[None],
        keys=operands.pooled(keys, key_weights),
        values=operands.pooled(values, value_weights),
        mask=Mask(causal=True, window=call.window),
        scale=call.scale,
        softcap=call.softcap,
        paging=paging,
    )
    if inputs.lengths.groups > _MOST_GROUPS:
        raise NotImplementedError(
            f"{inputs.lengths.groups} query heads for a KV head; the kernel takes {_MOST_GROUPS}"
        )
    _check_stored(device, inputs)
    out, lse = split_calls.ragged(device, inputs, call.rows)
    return out[0], lse[0]


def _check(q: Array) -> None:
    if str(q.dtype) not in _DTYPES:
        raise NotImplementedError(f"{q.dtype} queries; served are {', '.join(_DTYPES)}")


def inputs_of(call: AttentionCall) -> Inputs:
    """What the kernels read.

    Raises:
      NotImplementedError: types, sizes or sources that they do not serve.
    """
    _check(call.q)
    keys, values, key_weights, value_weights = call.sources
    return Inputs(
        q=call.q,
        keys=operands.contiguous(keys, key_weights, call.q.dtype),
        values=operands.contiguous(values, value_weights, call.q.dtype),
        mask=call.mask,
        scale=call.scale,
        softcap=call.softcap,
    )


def _check_stored(device: GpuTarget, inputs: Inputs) -> None:
    """Refuses types that the chip does not have."""
    stored = {str(x.dtype) for x in (*inputs.keys.arrays, *inputs.values.arrays)}
    needed = 89 if "float8_e4m3fn" in stored else 80
    if device.compute_capability < needed:
        raise NotImplementedError(
            f"{', '.join(sorted(stored))} sources need compute capability {needed / 10}; "
            f"{device.kind} has {device.compute_capability / 10}"
        )


def _run(device: GpuTarget, inputs: Inputs) -> Result:
    """(out, lse) by the kernel for this many queries."""
    _check_stored(device, inputs)
    shape = inputs.lengths
    decodes = phase(shape.rows, shape.queries, shape.keys) == DECODE
    # The split kernel has no segments, which only whole sequences have.
    if decodes and inputs.mask.q_segment_ids is None:
        sizes = split_calls.sizes_for(device, inputs, shape.rows)
        if sizes is not None:
            return split_calls.decode(device, inputs, sizes=sizes)
    return calls.forward(device, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(device: GpuTarget, call: AttentionCall) -> Result:
    return _forward(device, call)[0]


def _forward(device: GpuTarget, call: AttentionCall) -> tuple[Result, Residuals]:
    out, lse = named(*_run(device, inputs_of(call)))
    return (out, lse), (call, out, lse)


def gradients(device: GpuTarget, residuals: Residuals, cotangents: Result) -> tuple[AttentionCall]:
    """The gradients of a call by the Triton kernels, whichever kernel has made out and lse."""
    call, out, lse = residuals
    dout, lse, delta = linear.statistics(out, lse, cotangents, jnp.inf)  # exp(x - inf) = 0
    dq, dkey, dvalue = calls.backward(device, inputs_of(call), lse, dout, delta)
    present = None
    if call.mask.ragged:
        present = masks.key_positions(call.mask, dkey.shape[1]) >= 0
        present = jnp.asarray(present)[:, :, None, None]
    keys, values, key_weights, value_weights = call.sources
    dkeys, dkey_weights = linear.unmix(dkey, keys, key_weights, present)
    dvalues, dvalue_weights = linear.unmix(dvalue, values, value_weights, present)
    sources = MixedSources(dkeys, dvalues, dkey_weights, dvalue_weights)
    return (dataclasses.replace(call, q=dq, sources=sources, mask=None),)


_attend.defvjp(_forward, gradients)
