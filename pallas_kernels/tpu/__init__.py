"""Attention on TPUs, by Pallas kernels: which of them serves a call.

    few queries                              decode (stacked, contiguous or paged)
    J * H no wider than the matrix unit      folded: side by side, one product
    else                                     tile: mixed in VMEM

Folded and tile are one kernel, which on one source without weights is plain flash attention; the
backward pass of all three is its fused backward kernel. Compiled for v5e and v6e, it needs 1.00
and 0.97 of the bundles of jax's splash attention at H = 128 (`static`), and unlike that takes
positions known only at run time, rows that see nothing, and gradients through the lse.
"""

import functools

import jax
from jax import Array

from pallas_kernels import checks
from pallas_kernels.call import AttentionCall, PagedAttentionCall, RaggedAttentionCall
from pallas_kernels.masks import Mask
from pallas_kernels.phases import DECODE
from pallas_kernels.quantized import is_quantized
from pallas_kernels.sources import MixedSources, Result
from pallas_kernels.stacked import Stacked, is_stacked, read
from pallas_kernels.tpu import (
    attend,
    chips,
    decode_contiguous,
    decode_inputs,
    decode_paged,
    decode_stacked,
    folded,
    ragged,
)
from pallas_kernels.tpu.attend import Residuals
from pallas_kernels.tpu.blocks import Blocks
from pallas_kernels.tpu.how import How, Interpret
from pallas_kernels.tpu.topology import compile_for, compiling_for

__all__ = [
    "Blocks",
    "attention",
    "compile_for",
    "compiling_for",
    "paged_attention",
    "ragged_attention",
]


def attention(
    call: AttentionCall,
    *,
    chip: str | None = None,
    interpret: Interpret = False,
    blocks: Blocks | None = None,
) -> Result:
    """Attention by the kernel that suits the chip and the phase; see `pallas_kernels.attention`.

    Args:
      call: what is computed.
      chip: a name of `chips.CHIPS`; by default the device, or the abstract one in context.
      interpret: run on any device: True, or `pltpu.InterpretParams` to simulate copies.
      blocks: block sizes of the prefill and training kernels, by default `Blocks.choose`.

    Raises:
      NotImplementedError: not a TPU, or nothing here serves the call; the reason is given.
    """
    how = How(call.scale, call.softcap, chips.current(chip), interpret, blocks)
    sources = call.sources
    if is_stacked((*sources.keys, *sources.values)):
        try:
            return _stacked(how, call)
        except NotImplementedError:
            keys, values = read(sources.keys), read(sources.values)
            sources = sources._replace(keys=keys, values=values)
    if call.q.dtype not in ("bfloat16", "float32"):
        raise NotImplementedError(f"q is {call.q.dtype}; TPUs take bfloat16 and float32")
    # A refusal here is for XLA, which reads such a cache without turning it round, or unpacking it.
    if call.phase == DECODE and decode_inputs.fits(call.q):
        decode_contiguous.check(how, sources)
        if is_quantized((*sources.keys, *sources.values)):
            return decode_contiguous.contiguous(how, call.q, sources, call.mask)
        return _decode(how, call.q, sources, call.mask)
    return folded.folded(how, call.q, sources, call.mask)


def _stacked(how: How, call: AttentionCall) -> Result:
    both = [x for side in call.sources[:2] for x in side]
    if not all(isinstance(x, Stacked) and x.data.ndim == 4 for x in both):
        raise NotImplementedError("not all sources are stacked with the heads of a token together")
    run = functools.partial(decode_stacked.stacked, how)
    reason = "sources in a stacked cache are not differentiated on TPU; pass arrays"
    arguments = (call.q, call.sources, call.mask)
    return checks.without_gradients(lambda arguments: run(*arguments), reason, arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(how: How, q: Array, sources: MixedSources, mask: Mask) -> Result:
    return decode_contiguous.contiguous(how, q, sources, mask)


def _decode_forward(
    how: How, q: Array, sources: MixedSources, mask: Mask
) -> tuple[Result, Residuals]:
    out, lse = decode_contiguous.contiguous(how, q, sources, mask)
    return (out, lse), (q, sources, mask, out, lse)


def _decode_backward(
    how: How, residuals: Residuals, cotangents: Result
) -> tuple[Array, MixedSources, None]:
    return (*attend.gradients(how, residuals, cotangents), None)


_decode.defvjp(_decode_forward, _decode_backward)


def paged_attention(
    call: PagedAttentionCall, *, chip: str | None = None, interpret: Interpret = False
) -> Result:
    """Attention of each row's last tokens over pages; see `pallas_kernels.paged_attention`."""
    how = How(call.scale, call.softcap, chips.current(chip), interpret)
    return decode_paged.paged(how, call)


def ragged_attention(
    call: RaggedAttentionCall, *, chip: str | None = None, interpret: Interpret = False
) -> tuple[Array, Array | None]:
    """Attention of chunks and single tokens over pages; see `pallas_kernels.ragged_attention`."""
    return ragged.ragged(How(call.scale, call.softcap, chips.current(chip), interpret), call)
