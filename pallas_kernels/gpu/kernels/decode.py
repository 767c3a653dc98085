"""Few queries against a long cache: sources folded into queries and outputs, keys in splits.

The weights of the keys multiply the queries, those of the values the outputs, so a tile goes to
the matrix unit as it was stored:

    q_j = a_j q                                       once
    for each tile of BN keys of the split:
        s = scale log2(e) sum_j q_j.K_j^T             8 bits: each product times its scales
        p, decay = online softmax of s                as in `forward`
        out_j = decay out_j + p.V_j                   8 bits: p times its scales, then rounded
    write sum_j b_j out_j, top and total

Splits fill the GPU where rows are few; they end with different maxima, so `combine`, a second
kernel, rescales and adds them. It has one program for a row, and a few numbers for a split.

In a RAGGED step b is a piece of a list of work: a block of the queries of some row, a chunk's or
the single one of a row that decodes, whose streams lie in slots of pools of pages.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.gpu.kernels.parts import (
    HIDDEN,
    LN2,
    locate,
    logits,
    product,
    scales,
    tile,
    visible,
    weight,
)


@triton.jit
@no_type_check
def fold(q, weights, j: tl.constexpr, k, K: tl.constexpr, H: tl.constexpr, BH: tl.constexpr,
         NUM: tl.constexpr, WEIGHTED: tl.constexpr):  # fmt: skip
    """Queries times the weights of key source j; unused when there is no such source."""
    if WEIGHTED and j < NUM:
        return (q.to(tl.float32) * weight(weights, j, k, K, H, BH)[None, :]).to(q.dtype)
    else:
        return q


@triton.jit
@no_type_check
def score(q, source, scale, base, offset, keep, total, STRIDE: tl.constexpr,
          SCALE_STRIDE: tl.constexpr, H: tl.constexpr, BH: tl.constexpr,
          QUANTIZED: tl.constexpr):  # fmt: skip
    """total + q @ source^T for one tile."""
    x = tile(source, base, offset, keep, STRIDE, H, BH, True).to(q.dtype)
    if QUANTIZED:
        part = product(q, tl.trans(x), tl.zeros_like(total))
        return total + part * scales(scale, base, offset, keep, SCALE_STRIDE, True)[None, :]
    else:
        return product(q, tl.trans(x), total)


@triton.jit
@no_type_check
def read(p, source, scale, base, offset, keep, total, dtype: tl.constexpr, STRIDE: tl.constexpr,
         SCALE_STRIDE: tl.constexpr, HV: tl.constexpr, BHV: tl.constexpr,
         QUANTIZED: tl.constexpr):  # fmt: skip
    """total + p @ source for one tile."""
    x = tile(source, base, offset, keep, STRIDE, HV, BHV, True).to(dtype)
    if QUANTIZED:
        p = p * scales(scale, base, offset, keep, SCALE_STRIDE, True)[None, :]
    return product(p.to(dtype), x, total)


@triton.jit
@no_type_check
def slot(pool, slots, j: tl.constexpr, size, NUM: tl.constexpr):
    """The part of a pool that holds stream j; unused when there is no such stream."""
    if j < NUM:
        return pool + tl.load(slots + j).to(tl.int64) * size
    else:
        return pool


@triton.jit
@no_type_check
def decode(q_ptr, kw, vw, k0, k1, k2, k3, v0, v1, v2, v3, ks0, ks1, ks2, ks3, vs0, vs1, vs2, vs3,
           span, q_at_ptr, k_at_ptr, table, work, slots, T, S, POOL, part_ptr, top_ptr, total_ptr,
           K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, BH: tl.constexpr,
           BHV: tl.constexpr, NUM_K: tl.constexpr, NUM_V: tl.constexpr, WEIGHTED_K: tl.constexpr,
           WEIGHTED_V: tl.constexpr, QUANTIZED_K: tl.constexpr, QUANTIZED_V: tl.constexpr,
           STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr, SCALE_STRIDE: tl.constexpr,
           PAGE: tl.constexpr, PAGES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
           POSITIONS: tl.constexpr, Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr,
           SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SPLITS: tl.constexpr, RAGGED: tl.constexpr,
           BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Sums of one split: part [B, K, SPLITS, T * G, H'], top and total [B, K, SPLITS, T * G].

    Grid (B * K, SPLITS). The tokens of a row, span[b], are cut evenly, so that rows of all
    lengths keep all splits busy. RAGGED: work [B, 4] has the row of a piece, the place of its first
    query, how many of T there are, and the position of the first; POOL tokens are in a slot.
    """
    if RAGGED:
        tokens = tl.zeros((), tl.int64) + POOL * K
        k0, k1 = slot(k0, slots, 0, tokens * H, NUM_K), slot(k1, slots, 1, tokens * H, NUM_K)
        k2, k3 = slot(k2, slots, 2, tokens * H, NUM_K), slot(k3, slots, 3, tokens * H, NUM_K)
        ks0, ks1 = slot(ks0, slots, 0, tokens, NUM_K), slot(ks1, slots, 1, tokens, NUM_K)
        ks2, ks3 = slot(ks2, slots, 2, tokens, NUM_K), slot(ks3, slots, 3, tokens, NUM_K)
        other = slots + NUM_K
        v0, v1 = (
            slot(v0, other, 0, tokens * HV, NUM_V),
            slot(v1, other, 1, tokens * HV, NUM_V),
        )
        v2, v3 = (
            slot(v2, other, 2, tokens * HV, NUM_V),
            slot(v3, other, 3, tokens * HV, NUM_V),
        )
        vs0, vs1 = slot(vs0, other, 0, tokens, NUM_V), slot(vs1, other, 1, tokens, NUM_V)
        vs2, vs3 = slot(vs2, other, 2, tokens, NUM_V), slot(vs3, other, 3, tokens, NUM_V)
    elif PAGE > 0:  # one record: the keys of a token, then its values
        k1, k2, k3 = k1 + H, k2 + 2 * H, k3 + 3 * H
        v0, v1 = v0 + NUM_K * H, v1 + (NUM_K * H + HV)
        v2, v3 = v2 + (NUM_K * H + 2 * HV), v3 + (NUM_K * H + 3 * HV)
        ks1, ks2, ks3 = ks1 + 1, ks2 + 2, ks3 + 3
        vs0, vs1, vs2, vs3 = vs0 + NUM_K, vs1 + (NUM_K + 1), vs2 + (NUM_K + 2), vs3 + (NUM_K + 3)
    bk, split = tl.program_id(0), tl.program_id(1)
    b, k = bk // K, bk % K
    r = tl.arange(0, BM)
    live = r < T * G
    d, dv = tl.arange(0, BH), tl.arange(0, BHV)
    if RAGGED:
        owner = tl.load(work + 4 * b)
        there = r < tl.load(work + 4 * b + 2) * G
        first_place = tl.load(work + 4 * b + 1).to(tl.int64)
        q_at = tl.where(there, tl.load(work + 4 * b + 3) + r // G, -1)
    else:
        owner, there, first_place = b, live, b.to(tl.int64) * T
        q_at = tl.load(q_at_ptr + b * (Q_ROWS * T) + r // G, mask=live, other=-1)
    row = (first_place + r // G) * (K * G) + k * G + r % G
    q = tl.load(q_ptr + row[:, None] * H + d[None, :], mask=there[:, None] & (d < H)[None, :],
                other=0)  # fmt: skip
    q0 = fold(q, kw, 0, k, K, H, BH, NUM_K, WEIGHTED_K)
    q1 = fold(q, kw, 1, k, K, H, BH, NUM_K, WEIGHTED_K)
    q2 = fold(q, kw, 2, k, K, H, BH, NUM_K, WEIGHTED_K)
    q3 = fold(q, kw, 3, k, K, H, BH, NUM_K, WEIGHTED_K)

    first, last = tl.load(span + 2 * b), tl.load(span + 2 * b + 1)
    size = tl.cdiv(tl.cdiv(last - first, BN), SPLITS) * BN
    low = first + split * size
    high = tl.minimum(low + size, last)

    top = tl.full((BM,), HIDDEN / 2, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    out0 = tl.zeros((BM, BHV), tl.float32)
    out1 = tl.zeros((BM, BHV), tl.float32)
    out2 = tl.zeros((BM, BHV), tl.float32)
    out3 = tl.zeros((BM, BHV), tl.float32)
    n = tl.arange(0, BN)
    # Pages of the next tile are read a tile ahead: a copy need not wait for its address.
    base, offset = locate(owner, k, low, low + n < high, S, table, K, BN, PAGE, PAGES, True,
                          RAGGED)  # fmt: skip
    for start in range(low, high, BN):
        keep = start + n < high
        if PAGE == 0:
            base = (b.to(tl.int64) * S + start) * K + k
        else:
            ahead = start + BN
            base, following = locate(owner, k, ahead, ahead + n < high, S, table, K, BN, PAGE,
                                     PAGES, True, RAGGED)  # fmt: skip
        if POSITIONS:
            k_at = tl.load(k_at_ptr + b * (K_ROWS * S) + start + n, mask=keep, other=-1)
            keep = k_at >= 0
        else:
            k_at = tl.where(keep, start + n, -1)
        s = tl.zeros((BM, BN), tl.float32)
        s = score(q0, k0, ks0, base, offset, keep, s, STRIDE_K, SCALE_STRIDE, H, BH, QUANTIZED_K)
        if NUM_K > 1:
            s = score(q1, k1, ks1, base, offset, keep, s, STRIDE_K, SCALE_STRIDE, H, BH,
                      QUANTIZED_K)  # fmt: skip
        if NUM_K > 2:
            s = score(q2, k2, ks2, base, offset, keep, s, STRIDE_K, SCALE_STRIDE, H, BH,
                      QUANTIZED_K)  # fmt: skip
        if NUM_K > 3:
            s = score(q3, k3, ks3, base, offset, keep, s, STRIDE_K, SCALE_STRIDE, H, BH,
                      QUANTIZED_K)  # fmt: skip
        s = logits(s, SCALE, SOFTCAP)
        seen = visible(q_at[:, None], k_at[None, :], 0, 0, CAUSAL, WINDOW, False)
        s = tl.where(seen, s, HIDDEN)
        higher = tl.maximum(top, tl.max(s, 1))
        decay = tl.exp2(top - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * decay + tl.sum(p, 1)
        top = higher
        out0 = read(p, v0, vs0, base, offset, keep, out0 * decay[:, None], q.dtype, STRIDE_V,
                    SCALE_STRIDE, HV, BHV, QUANTIZED_V)  # fmt: skip
        if NUM_V > 1:
            out1 = read(p, v1, vs1, base, offset, keep, out1 * decay[:, None], q.dtype, STRIDE_V,
                        SCALE_STRIDE, HV, BHV, QUANTIZED_V)  # fmt: skip
        if NUM_V > 2:
            out2 = read(p, v2, vs2, base, offset, keep, out2 * decay[:, None], q.dtype, STRIDE_V,
                        SCALE_STRIDE, HV, BHV, QUANTIZED_V)  # fmt: skip
        if NUM_V > 3:
            out3 = read(p, v3, vs3, base, offset, keep, out3 * decay[:, None], q.dtype, STRIDE_V,
                        SCALE_STRIDE, HV, BHV, QUANTIZED_V)  # fmt: skip
        if PAGE > 0:
            offset = following

    if WEIGHTED_V:
        out0 = out0 * weight(vw, 0, k, K, HV, BHV)[None, :]
        if NUM_V > 1:
            out0 += out1 * weight(vw, 1, k, K, HV, BHV)[None, :]
        if NUM_V > 2:
            out0 += out2 * weight(vw, 2, k, K, HV, BHV)[None, :]
        if NUM_V > 3:
            out0 += out3 * weight(vw, 3, k, K, HV, BHV)[None, :]
    at = (bk.to(tl.int64) * SPLITS + split) * T * G + r
    tl.store(part_ptr + at[:, None] * HV + dv[None, :], out0,
             mask=live[:, None] & (dv < HV)[None, :])  # fmt: skip
    tl.store(top_ptr + at, top, mask=live)
    tl.store(total_ptr + at, total, mask=live)


@triton.jit
@no_type_check
def combine(part_ptr, top_ptr, total_ptr, work, T, out_ptr, lse_ptr, K: tl.constexpr,
            G: tl.constexpr, HV: tl.constexpr, BHV: tl.constexpr, SPLITS: tl.constexpr,
            ALL: tl.constexpr, CHUNK: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """Output [B, T, N, H'] and lse [B, T, N] from the sums of the splits. Grid (B * K, T * G).

    RAGGED: those of all pieces, [T, N, H'] and [T, N]; what is of no piece is not written.
    """
    bk, r = tl.program_id(0), tl.program_id(1)
    b, k = bk // K, bk % K
    first_place = b.to(tl.int64) * T
    if RAGGED:
        first_place = tl.load(work + 4 * b + 1).to(tl.int64)
        if r >= tl.load(work + 4 * b + 2) * G:
            return
    every = tl.arange(0, ALL)
    at = bk.to(tl.int64) * SPLITS * T * G + r
    tops = tl.load(top_ptr + at + every * (T * G), mask=every < SPLITS, other=HIDDEN)
    totals = tl.load(total_ptr + at + every * (T * G), mask=every < SPLITS, other=0)
    top = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp2(tops - top), 0)
    dv = tl.arange(0, BHV)
    out = tl.zeros((BHV,), tl.float32)
    for start in range(0, SPLITS, CHUNK):
        s = start + tl.arange(0, CHUNK)
        share = tl.exp2(tl.load(top_ptr + at + s * (T * G), mask=s < SPLITS, other=HIDDEN) - top)
        where = at + s.to(tl.int64) * (T * G)
        part = tl.load(part_ptr + where[:, None] * HV + dv[None, :],
                       mask=(s < SPLITS)[:, None] & (dv < HV)[None, :], other=0)  # fmt: skip
        out += tl.sum(part * share[:, None], 0)
    some = total > 0
    total = tl.where(some, total, 1.0)
    row = (first_place + r // G) * (K * G) + k * G + r % G
    tl.store(out_ptr + row * HV + dv, (out / total).to(out_ptr.dtype.element_ty), mask=dv < HV)
    tl.store(lse_ptr + row, tl.where(some, (top + tl.log2(total)) * LN2, float("-inf")))
