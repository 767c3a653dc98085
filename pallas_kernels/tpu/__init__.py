"""Attention on TPUs, by Pallas kernels: which of them serves a call.

    few queries                              decode (stacked, contiguous or paged)
    J * H no wider than the matrix unit      folded: side by side, one product
    else                                     tile: mixed in VMEM

Folded and tile are one kernel, which on one source without weights is plain flash attention; the
backward pass of all three is its fused backward kernel. Compiled for v5e and v6e, it needs 0.98
and 0.93 of the bundles of jax's splash attention at H = 128 (`static`), and unlike that takes
positions known only at run time, rows that see nothing, and gradients through the lse.
"""

import functools
from collections.abc import Sequence

import jax
from jax import Array

from pallas_kernels import checks
from pallas_kernels.masks import Mask
from pallas_kernels.paged import Pages
from pallas_kernels.phases import DECODE, phase
from pallas_kernels.quantized import is_quantized
from pallas_kernels.sources import MixedSources, Result, Source
from pallas_kernels.stacked import Stacked, is_stacked, read
from pallas_kernels.tpu import (
    attend,
    chips,
    decode_contiguous,
    decode_inputs,
    decode_paged,
    decode_stacked,
    folded,
)
from pallas_kernels.tpu.attend import Residuals
from pallas_kernels.tpu.blocks import Blocks
from pallas_kernels.tpu.how import How, Interpret
from pallas_kernels.tpu.topology import compile_for, compiling_for

__all__ = ["Blocks", "attention", "compile_for", "compiling_for", "paged_attention"]


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
    chip: str | None = None,
    interpret: Interpret = False,
    blocks: Blocks | None = None,
) -> Result:
    """Attention by the kernel that suits the chip and the phase; see `pallas_kernels.attention`.

    Args:
      chip: a name of `chips.CHIPS`; by default the device, or the abstract one in context.
      interpret: run on any device: True, or `pltpu.InterpretParams` to simulate copies.
      blocks: block sizes of the prefill and training kernels, by default `Blocks.choose`.

    Raises:
      NotImplementedError: not a TPU, or nothing here serves the call; the reason is given.
    """
    how = attend.How(scale, softcap, chips.current(chip))
    sources = MixedSources(keys, values, key_weights, value_weights)
    if is_stacked((*keys, *values)):
        try:
            return _stacked(how, interpret, q, sources, mask)
        except NotImplementedError:
            keys, values = read(keys), read(values)
            sources = sources._replace(keys=keys, values=values)
    widths = (keys[0].shape[3], values[0].shape[3])
    if is_quantized((*keys, *values)):
        decode_inputs.check_lanes(widths, "heads", interpret)
        return decode_contiguous.contiguous(how, interpret, q, sources, mask)
    if q.dtype not in ("bfloat16", "float32"):
        raise NotImplementedError(f"q is {q.dtype}; TPUs take bfloat16 and float32")
    heads = keys[0].shape[2]
    if blocks is None:
        blocks = Blocks.choose(q.shape[2] // heads, q.shape[1], keys[0].shape[1])
    return _attend(how, blocks, interpret, q, sources, mask)


def _stacked(how: How, interpret: Interpret, q: Array, sources: MixedSources, mask: Mask) -> Result:
    if not all(isinstance(x, Stacked) for side in sources[:2] for x in side):
        raise NotImplementedError("some sources are stacked and others are not")
    run = functools.partial(decode_stacked.stacked, how, interpret)
    reason = "sources in a stacked cache are not differentiated on TPU; pass arrays"
    return checks.without_gradients(lambda arguments: run(*arguments), reason, (q, sources, mask))


def _attend(
    how: How, blocks: Blocks, interpret: Interpret, q: Array, sources: MixedSources, mask: Mask
) -> Result:
    _, length, heads, _ = q.shape
    _, num_keys, kv_heads, _ = sources.keys[0].shape
    decodes = phase(length * heads // kv_heads, length, num_keys) == DECODE
    if decodes and length * heads <= decode_inputs.MAX_ROWS:
        widths = [side[0].shape[3] for side in sources[:2]]
        decode_inputs.check_lanes(widths, "heads", interpret)
        try:
            return _decode(how, blocks, interpret, q, sources, mask)
        except NotImplementedError:
            pass  # segments, or an odd length: the tile kernel takes any mask
    return folded.folded(how, (blocks, blocks), interpret, q, sources, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _decode(
    how: How, blocks: Blocks, interpret: Interpret, q: Array, sources: MixedSources, mask: Mask
) -> Result:
    return decode_contiguous.contiguous(how, interpret, q, sources, mask)


def _decode_forward(
    how: How, blocks: Blocks, interpret: Interpret, q: Array, sources: MixedSources, mask: Mask
) -> tuple[Result, Residuals]:
    out, lse = decode_contiguous.contiguous(how, interpret, q, sources, mask)
    return (out, lse), (q, sources, mask, out, lse)


def _decode_backward(
    how: How, blocks: Blocks, interpret: Interpret, residuals: Residuals, cotangents: Result
) -> tuple[Array, MixedSources, None]:
    return (*attend.gradients(how, blocks, interpret, residuals, cotangents), None)


_decode.defvjp(_decode_forward, _decode_backward)


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
    chip: str | None = None,
    interpret: Interpret = False,
) -> Result:
    """Attention of each row's last tokens over pages; see `pallas_kernels.paged_attention`."""
    how = attend.How(scale, softcap, chips.current(chip))
    weights = (key_weights, value_weights)
    return decode_paged.paged(how, interpret, q, pages, page_table, kv_lengths, *weights, window)
