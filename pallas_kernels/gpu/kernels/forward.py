"""Many queries: sources are mixed tile by tile, in float32, and meet an online softmax."""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.gpu.kernels.parts import (
    HIDDEN,
    LN2,
    locate,
    logits,
    mixed,
    product,
    visible,
    weight,
)


@triton.jit
@no_type_check
def loop(low, high, skip_from, skip, q, b, k, S, q_at, k_at_ptr, q_segment, k_segment_ptr, table,
         keys, values, key_scales, value_scales, wk, wv, top, total, out,
         K: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, BH: tl.constexpr, BHV: tl.constexpr,
         NUM_K: tl.constexpr, NUM_V: tl.constexpr, WEIGHTED_K: tl.constexpr,
         WEIGHTED_V: tl.constexpr, QUANTIZED_K: tl.constexpr, QUANTIZED_V: tl.constexpr,
         STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr, SCALE_STRIDE: tl.constexpr,
         PAGE: tl.constexpr, PAGES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
         SEGMENTS: tl.constexpr, K_ROWS: tl.constexpr, SCALE: tl.constexpr,
         SOFTCAP: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Tiles low .. high of the keys, past `skip` ones from `skip_from` on."""
    n = tl.arange(0, BN)
    for i in range(low, high):
        block = i + tl.where(i >= skip_from, skip, 0)
        start = block * BN
        keep = start + n < S
        if MASKED:
            k_at = tl.load(k_at_ptr + b * (K_ROWS * S) + start + n, mask=keep, other=-1)
            k_segment = k_at
            if SEGMENTS:
                k_segment = tl.load(k_segment_ptr + b * S + start + n, mask=keep, other=-1)
            keep = k_at >= 0
        base, offset = locate(b, k, start, keep, S, table, K, BN, PAGE, PAGES, MASKED)
        key = mixed(keys, key_scales, wk, base, offset, keep, NUM_K, STRIDE_K, SCALE_STRIDE, H, BH,
                    WEIGHTED_K, QUANTIZED_K, MASKED, q.dtype)  # fmt: skip
        s = product(q, tl.trans(key), tl.zeros((q.shape[0], BN), tl.float32))
        s = logits(s, SCALE, SOFTCAP)
        if MASKED:
            seen = visible(q_at[:, None], k_at[None, :], q_segment[:, None], k_segment[None, :],
                           CAUSAL, WINDOW, SEGMENTS)  # fmt: skip
            s = tl.where(seen, s, HIDDEN)
        higher = tl.maximum(top, tl.max(s, 1))
        decay = tl.exp2(top - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * decay + tl.sum(p, 1)
        top = higher
        value = mixed(values, value_scales, wv, base, offset, keep, NUM_V, STRIDE_V, SCALE_STRIDE,
                      HV, BHV, WEIGHTED_V, QUANTIZED_V, MASKED, q.dtype)  # fmt: skip
        out = product(p.to(q.dtype), value, out * decay[:, None])
    return top, total, out


@triton.jit
@no_type_check
def forward(q_ptr, kw, vw, k0, k1, k2, k3, v0, v1, v2, v3, ks0, ks1, ks2, ks3, vs0, vs1, vs2, vs3,
            bounds, q_at_ptr, k_at_ptr, q_segment_ptr, k_segment_ptr, table, T, S,
            out_ptr, lse_ptr,
            K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
            BH: tl.constexpr, BHV: tl.constexpr, NUM_K: tl.constexpr, NUM_V: tl.constexpr,
            WEIGHTED_K: tl.constexpr, WEIGHTED_V: tl.constexpr, QUANTIZED_K: tl.constexpr,
            QUANTIZED_V: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr,
            SCALE_STRIDE: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr,
            CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
            Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr, BOUND_ROWS: tl.constexpr,
            SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr,
            BN: tl.constexpr):  # fmt: skip
    """Output [B, T, N, H'] and lse [B, T, N] of a block of rows. Grid (row blocks, B * K).

    bounds[b, i] = (low, high, clear_low, clear_high): tiles outside [low, high) hold nothing
    that block i sees, and inside [clear_low, clear_high) it sees everything.
    """
    if PAGE > 0:  # one record: the keys of a token, then its values
        k1, k2, k3 = k1 + H, k2 + 2 * H, k3 + 3 * H
        v0, v1 = v0 + NUM_K * H, v1 + (NUM_K * H + HV)
        v2, v3 = v2 + (NUM_K * H + 2 * HV), v3 + (NUM_K * H + 3 * HV)
        ks1, ks2, ks3 = ks1 + 1, ks2 + 2, ks3 + 3
        vs0, vs1, vs2, vs3 = vs0 + NUM_K, vs1 + (NUM_K + 1), vs2 + (NUM_K + 2), vs3 + (NUM_K + 3)
    blocks = tl.num_programs(0)
    i = blocks - 1 - tl.program_id(0)  # with a causal mask the last blocks have most to do
    bk = tl.program_id(1)
    b, k = bk // K, bk % K
    r = i * BM + tl.arange(0, BM)
    t = r // G
    live = t < T
    d, dv = tl.arange(0, BH), tl.arange(0, BHV)
    row = (b.to(tl.int64) * T + t) * (K * G) + k * G + r % G
    q = tl.load(q_ptr + row[:, None] * H + d[None, :], mask=live[:, None] & (d < H)[None, :],
                other=0)  # fmt: skip
    q_at = tl.load(q_at_ptr + b * (Q_ROWS * T) + t, mask=live, other=-1)
    q_segment = q_at
    if SEGMENTS:
        q_segment = tl.load(q_segment_ptr + b * T + t, mask=live, other=-1)
    at = bounds + (b * (BOUND_ROWS * blocks) + i) * 4
    low, high = tl.load(at), tl.load(at + 1)
    clear_low, clear_high = tl.load(at + 2), tl.load(at + 3)
    clear = clear_high - clear_low

    keys, values = (k0, k1, k2, k3), (v0, v1, v2, v3)
    key_scales, value_scales = (ks0, ks1, ks2, ks3), (vs0, vs1, vs2, vs3)
    wk = (weight(kw, 0, k, K, H, BH), weight(kw, min(1, NUM_K - 1), k, K, H, BH),
          weight(kw, min(2, NUM_K - 1), k, K, H, BH),
          weight(kw, min(3, NUM_K - 1), k, K, H, BH))  # fmt: skip
    wv = (weight(vw, 0, k, K, HV, BHV), weight(vw, min(1, NUM_V - 1), k, K, HV, BHV),
          weight(vw, min(2, NUM_V - 1), k, K, HV, BHV),
          weight(vw, min(3, NUM_V - 1), k, K, HV, BHV))  # fmt: skip
    top = tl.full((BM,), HIDDEN / 2, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, BHV), tl.float32)
    top, total, out = loop(
        clear_low, clear_high, clear_high, 0, q, b, k, S, q_at, k_at_ptr, q_segment,
        k_segment_ptr, table, keys, values, key_scales, value_scales, wk, wv, top, total, out,
        K, H, HV, BH, BHV, NUM_K, NUM_V, WEIGHTED_K, WEIGHTED_V, QUANTIZED_K, QUANTIZED_V,
        STRIDE_K, STRIDE_V, SCALE_STRIDE, PAGE, PAGES, CAUSAL, WINDOW, SEGMENTS, K_ROWS, SCALE,
        SOFTCAP, BN, False,
    )  # fmt: skip
    top, total, out = loop(
        low, high - clear, clear_low, clear, q, b, k, S, q_at, k_at_ptr, q_segment,
        k_segment_ptr, table, keys, values, key_scales, value_scales, wk, wv, top, total, out,
        K, H, HV, BH, BHV, NUM_K, NUM_V, WEIGHTED_K, WEIGHTED_V, QUANTIZED_K, QUANTIZED_V,
        STRIDE_K, STRIDE_V, SCALE_STRIDE, PAGE, PAGES, CAUSAL, WINDOW, SEGMENTS, K_ROWS, SCALE,
        SOFTCAP, BN, True,
    )  # fmt: skip
    some = total > 0
    total = tl.where(some, total, 1.0)
    tl.store(out_ptr + row[:, None] * HV + dv[None, :],
             (out / total[:, None]).to(out_ptr.dtype.element_ty),
             mask=live[:, None] & (dv < HV)[None, :])  # fmt: skip
    lse = tl.where(some, (top + tl.log2(total)) * LN2, float("-inf"))
    tl.store(lse_ptr + row, lse, mask=live)
