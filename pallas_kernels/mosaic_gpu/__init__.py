"""Attention over sequences on Hopper by a Pallas Mosaic GPU kernel: TMA, warpgroups and wgmma.

Training and prefill of 16-bit keys and values, which the kernel mixes in shared memory; gradients
are the Triton kernels'. It has run in Pallas' interpreter and been compiled for sm_90a, and never
run on a GPU: "auto" does not take it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import devices, gpu, masks
from pallas_kernels.call import AttentionCall
from pallas_kernels.gpu import bounds
from pallas_kernels.gpu.device import GpuTarget, current
from pallas_kernels.gpu.inputs import Inputs
from pallas_kernels.masks import ABSENT, Integers
from pallas_kernels.mosaic_gpu import kernel
from pallas_kernels.mosaic_gpu.plan import BLOCK, Plan
from pallas_kernels.quantized import is_quantized
from pallas_kernels.sources import Result, named

_CAPABILITY = 90  # wgmma is Hopper's alone
_SIZES = (64, 128)
_STAGES = 3  # tiles at most: one in use, one being mixed, one on its way
_BARRIERS = 2048  # bytes of shared memory for them, with room


def attention(
    call: AttentionCall, *, device: GpuTarget | None = None, interpret: Any = None
) -> Result:
    """Attention as `pallas_kernels.attention` says; residuals are the call, out and lse.

    Args:
      device: the GPU to compile for; by default this machine's.
      interpret: `jax.experimental.pallas.mosaic_gpu.InterpretGPUParams` (jax 0.11 or later) to
        run on a processor.

    Raises:
      NotImplementedError: no Hopper GPU, a missing package, or a call that the kernel does not
        serve.
    """
    device = current() if device is None else device
    if device.compute_capability != _CAPABILITY:
        raise NotImplementedError(
            f"needs a Hopper GPU, compute capability {_CAPABILITY / 10}; {device.kind} has "
            f"{device.compute_capability / 10}"
        )
    plan_of(call, interpret)  # before tracing, so that a refusal is heard
    return _attend(device, interpret, call)


def plan_of(call: AttentionCall, interpret: Any = None) -> Plan:
    """What the kernel is compiled for.

    Raises:
      NotImplementedError: the kernel does not serve the call.
    """
    reason = _refusal(call)
    if reason:
        raise NotImplementedError(f"the Mosaic GPU kernel serves no {reason}")
    keys, values, key_weights, value_weights = call.sources
    mask, (_, _, num_heads, size) = call.mask, call.q.shape
    mixes = key_weights is not None or value_weights is not None or mask.ragged
    # What the kernel mixes shares the registers of the scores.
    tile = 64 if mixes and size == 128 else 128
    plan = Plan(
        keys=tile,
        stages=_STAGES,
        size=size,
        groups=num_heads // keys[0].shape[2],
        num_keys=len(keys),
        num_values=len(values),
        mix_keys=key_weights is not None,
        mix_values=value_weights is not None,
        absent=mask.ragged,
        causal=mask.causal,
        window=mask.window or 0,
        segments=mask.q_segment_ids is not None,
        scale=float(call.scale),
        softcap=float(call.softcap or 0.0),
        interpret=interpret,
    )
    for stages in range(_STAGES, 1, -1):
        found = dataclasses.replace(plan, stages=stages)
        if found.shared + _BARRIERS <= devices.shared_memory(_CAPABILITY):
            return found
    raise NotImplementedError(
        f"{len(keys)} and {len(values)} sources with heads of {size} do not fit in shared memory"
    )


def _refusal(call: AttentionCall) -> str:
    """What of the call is not served; empty if all is."""
    q, (keys, values, *_) = call.q, call.sources
    sizes = {x.shape[3] for x in (*keys, *values)}
    if is_quantized((*keys, *values)):
        return "Quantized sources"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype} queries, only bfloat16 and float16"
    if any(x.dtype not in (q.dtype, jnp.float32) for x in (*keys, *values)):
        return f"{keys[0].dtype} keys and {values[0].dtype} values beside {q.dtype} queries"
    if len(sizes) > 1 or not sizes <= set(_SIZES):
        return f"head sizes of {', '.join(map(str, sorted(sizes)))}, only 64 or 128 for both sides"
    return "" if call.scale > 0 else f"scale of {call.scale}, only positive ones"


def forward(call: AttentionCall, interpret: Any = None) -> Result:
    """Output [B, T, N, H] and lse [B, T, N] by the kernel; no gradients."""
    plan = plan_of(call, interpret)
    out, lse = kernel.forward(plan, *arguments(plan, call))
    return out, lse[:, :, : call.q.shape[1]].swapaxes(1, 2)


def arguments(plan: Plan, call: AttentionCall) -> tuple[Any, ...]:
    """Those of `kernel.forward`."""
    inputs = gpu.inputs_of(call)
    mask, shape = inputs.mask, inputs.lengths
    some, clear = bounds.tiles(mask, shape.queries, shape.keys, 1, BLOCK, plan.keys)
    return (
        inputs.q,
        inputs.keys.arrays,
        inputs.values.arrays,
        inputs.keys.weights,
        inputs.values.weights,
        bounds.runs(some, clear),
        _places(plan, inputs),
    )


def _places(plan: Plan, inputs: Inputs) -> list[Array]:
    """Positions and segments of queries and keys, of whole blocks and tiles."""
    mask, shape = inputs.mask, inputs.lengths
    found = [
        (masks.query_positions(mask, shape.queries, shape.keys), BLOCK),
        (masks.key_positions(mask, shape.keys), plan.keys),
    ]
    if plan.segments:
        found += [(mask.q_segment_ids, BLOCK), (mask.kv_segment_ids, plan.keys)]

    def fill(x: Integers, size: int) -> Array:
        x = jnp.asarray(x, jnp.int32)
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=ABSENT)

    return [fill(x, size) for x, size in found]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(device: GpuTarget, interpret: Any, call: AttentionCall) -> Result:
    return forward(call, interpret)


def _forward(
    device: GpuTarget, interpret: Any, call: AttentionCall
) -> tuple[Result, gpu.Residuals]:
    out, lse = named(*forward(call, interpret))
    return (out, lse), (call, out, lse)


def _backward(
    device: GpuTarget, interpret: Any, residuals: gpu.Residuals, cotangents: Result
) -> tuple[AttentionCall]:
    return gpu.gradients(device, residuals, cotangents)


_attend.defvjp(_forward, _backward)
