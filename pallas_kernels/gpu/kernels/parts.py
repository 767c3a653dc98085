"""What every kernel does: which keys a query sees, and reading, scaling and mixing tiles.

Rows are the queries of one KV head: row r is token r // G, head r % G of the group. Keys and
values are addressed by rows of their memory, a scalar `base` that moves with the loop and an
`offset` for each token of the tile that does not, unless pages say where a token is.
"""

from typing import no_type_check

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-2.0e38)  # finite: -inf - -inf would be NaN
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
@no_type_check
def product(x, y, total):
    """total + x @ y in float32; float32 operands as three TF32 products."""
    return tl.dot(x, y, total, input_precision="tf32x3")


@triton.jit
@no_type_check
def logits(score, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Base-2 logits of scaled and capped scores."""
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which has the right limits where exp overflows.
        high = tl.exp2(score * (2 * SCALE * LOG2E / SOFTCAP)) + 1
        return (SOFTCAP * LOG2E) - (2 * SOFTCAP * LOG2E) / high
    else:
        return score * (SCALE * LOG2E)


@triton.jit
@no_type_check
def slope(logit, SOFTCAP: tl.constexpr):
    """Derivative of the cap, 1 - tanh^2, from the logit."""
    tanh = logit * (1 / (SOFTCAP * LOG2E))
    return 1 - tanh * tanh


@triton.jit
@no_type_check
def visible(q_at, k_at, q_segment, k_segment, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
            SEGMENTS: tl.constexpr):  # fmt: skip
    """The rule of `masks.visible` for broadcastable positions; absent keys are negative."""
    seen = k_at >= 0
    if CAUSAL:
        seen = seen & (k_at <= q_at)
    if WINDOW > 0:
        seen = seen & (q_at - k_at < WINDOW)
    if SEGMENTS:
        seen = seen & (q_segment == k_segment) & (k_segment >= 0)
    return seen


@triton.jit
@no_type_check
def locate(b, k, start, keep, S, table, K: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
           PAGES: tl.constexpr, MASKED: tl.constexpr, TOGETHER: tl.constexpr = False):  # fmt: skip
    """(base, offset): where tokens start .. start + BN of row b, head k are, in memory rows.

    Heads of a token lie together in a pool of streams, tokens of a head in pages of records.
    """
    n = tl.arange(0, BN)
    if PAGE > 0:
        token = start + n
        at = table + b.to(tl.int64) * PAGES + token // PAGE
        if MASKED:
            page = tl.load(at, mask=keep, other=0)
        else:
            page = tl.load(at)
        base = tl.zeros((), tl.int64)
        if TOGETHER:
            offset = (page.to(tl.int64) * PAGE + token % PAGE) * K + k
        else:
            offset = (page.to(tl.int64) * K + k) * PAGE + token % PAGE
    else:
        base = (b.to(tl.int64) * S + start) * K + k
        offset = n * K
    return base, offset


@triton.jit
@no_type_check
def tile(source, base, offset, keep, STRIDE: tl.constexpr, SIZE: tl.constexpr,
         PADDED: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """[BN, PADDED] of one source; channels from SIZE on, and with MASKED what is absent, are 0."""
    d = tl.arange(0, PADDED)
    at = (source + base * STRIDE) + ((offset * STRIDE)[:, None] + d[None, :])
    if MASKED:
        if SIZE == PADDED:
            return tl.load(at, mask=keep[:, None], other=0.0)
        else:
            mask = keep[:, None] & (d < SIZE)[None, :]
            return tl.load(at, mask=mask, other=0.0)
    else:
        if SIZE == PADDED:
            return tl.load(at)
        else:
            mask = (d < SIZE)[None, :] & (offset >= 0)[:, None]
            return tl.load(at, mask=mask, other=0.0)


@triton.jit
@no_type_check
def scales(scale, base, offset, keep, STRIDE: tl.constexpr, MASKED: tl.constexpr):
    """[BN] scales of one source's tokens."""
    at = scale + base * STRIDE + offset * STRIDE
    if MASKED:
        return tl.load(at, mask=keep, other=0)
    else:
        return tl.load(at)


@triton.jit
@no_type_check
def weight(weights, j: tl.constexpr, k, K: tl.constexpr, SIZE: tl.constexpr,
           PADDED: tl.constexpr):  # fmt: skip
    """[PADDED] weights of source j, head k."""
    d = tl.arange(0, PADDED)
    return tl.load(weights + (j * K + k) * SIZE + d, mask=d < SIZE, other=0).to(tl.float32)


@triton.jit
@no_type_check
def scaled(source, scale, w, base, offset, keep, STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr,
           SIZE: tl.constexpr, PADDED: tl.constexpr, QUANTIZED: tl.constexpr,
           MASKED: tl.constexpr):  # fmt: skip
    """[BN, PADDED] of one source times its scales and weights, in float32."""
    x = tile(source, base, offset, keep, STRIDE, SIZE, PADDED, MASKED).to(tl.float32)
    if QUANTIZED:
        x = x * scales(scale, base, offset, keep, SCALE_STRIDE, MASKED)[:, None]
    return x * w[None, :]


@triton.jit
@no_type_check
def pinned(x):
    """x, in the layout that it has: a conversion does not move above this.

    Operands of a product that lie in registers have a layout of their own. Triton would convert
    every source to it, and mix there once for each product of the tile, with the weights of many
    channels in each thread; it cannot see through assembly that is not pure. Costs no instruction.
    A loop of several stages cannot have it, as Triton's pipeliner refuses such assembly.
    """
    PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, False, PACK)


@triton.jit
@no_type_check
def mixed(sources, scale, w, base, offset, keep, NUM: tl.constexpr, STRIDE: tl.constexpr,
          SCALE_STRIDE: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
          WEIGHTED: tl.constexpr, QUANTIZED: tl.constexpr, MASKED: tl.constexpr,
          STAGES: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """[BN, PADDED] of the weighted sum of the sources: float32, rounded once."""
    if WEIGHTED or QUANTIZED:
        total = scaled(sources[0], scale[0], w[0], base, offset, keep, STRIDE, SCALE_STRIDE, SIZE,
                       PADDED, QUANTIZED, MASKED)  # fmt: skip
        for j in tl.static_range(1, NUM):
            total += scaled(sources[j], scale[j], w[j], base, offset, keep, STRIDE, SCALE_STRIDE,
                            SIZE, PADDED, QUANTIZED, MASKED)  # fmt: skip
        if STAGES == 1:
            return pinned(total.to(dtype))
        else:
            return total.to(dtype)
    else:
        return tile(sources[0], base, offset, keep, STRIDE, SIZE, PADDED, MASKED).to(dtype)


@triton.jit
@no_type_check
def stream_weights(weights, k, K: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
                   NUM: tl.constexpr):  # fmt: skip
    """Weights of up to four sources, head k; a source that is not there repeats the last one, as
    tuples have one length, and its load is dropped as dead code."""
    return (weight(weights, 0, k, K, SIZE, PADDED),
            weight(weights, min(1, NUM - 1), k, K, SIZE, PADDED),
            weight(weights, min(2, NUM - 1), k, K, SIZE, PADDED),
            weight(weights, min(3, NUM - 1), k, K, SIZE, PADDED))  # fmt: skip


@triton.jit
@no_type_check
def tile_weights(held, weights, i, k, K: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
                 NUM: tl.constexpr):  # fmt: skip
    """The weights for tile i of a loop: those that are held, or read again where they are many.

    Four sources of 256 channels, keys and values, have 64 in each thread of eight warps, too many
    to be held beside the rest. Tiles are not negative, but the compiler does not know it, and
    leaves the loads in the loop.
    """
    if NUM * PADDED > 512:
        return stream_weights(weights + tl.minimum(i, 0), k, K, SIZE, PADDED, NUM)
    else:
        return held


@triton.jit
@no_type_check
def places(at_ptr, segment_ptr, b, index, there, count, ROWS: tl.constexpr,
           SEGMENTS: tl.constexpr):  # fmt: skip
    """Positions and segments of tokens `index` of row b, -1 where they are not `there`.

    ROWS is 0 where all rows of the batch have the same positions, which are stored once.
    """
    at = tl.load(at_ptr + b * (ROWS * count) + index, mask=there, other=-1)
    segment = at
    if SEGMENTS:
        segment = tl.load(segment_ptr + b * count + index, mask=there, other=-1)
    return at, segment


@triton.jit
@no_type_check
def run_of(bounds, b, i, blocks, BOUND_ROWS: tl.constexpr):
    """(low, high, clear_low, clear_high) of block i; see `bounds.runs`."""
    at = bounds + (b * (BOUND_ROWS * blocks) + i) * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
