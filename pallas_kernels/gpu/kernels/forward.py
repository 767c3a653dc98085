"""Many queries: sources are mixed tile by tile, in float32, and meet an online softmax.

A program owns a block of BM rows, the queries of one KV head, and goes over tiles of BN keys:

    for each tile of which the block sees anything:
        key    = a_0 K_0 + a_1 K_1 of the tile       in float32, rounded once
        s      = scale log2(e) q.key^T               HIDDEN where a row does not see a key
        higher = max(top, max s)                     of each row
        p, decay = 2^(s - higher), 2^(top - higher)
        total, out, top = decay total + sum p, decay out + p.value, higher
    write out / total, and ln 2 (top + log2 total)

Tiles that all of the block sees come first, in a loop without positions and masks; the others lie
before and after them, and are one loop that steps over the clear ones. A softmax does not mind the
order. Each source is read once for a block, so a block of few rows reads the sources often.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.gpu.kernels.parts import (
    HIDDEN,
    LN2,
    locate,
    logits,
    mixed,
    places,
    product,
    run_of,
    stream_weights,
    tile_weights,
    visible,
)


@triton.jit
@no_type_check
def loop(low, high, skip_from, skip, q, b, k, S, q_at, k_at_ptr, q_segment, k_segment_ptr, table,
         keys, values, key_scales, value_scales, kw, vw, wk, wv, top, total, out,
         K: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, BH: tl.constexpr, BHV: tl.constexpr,
         NUM_K: tl.constexpr, NUM_V: tl.constexpr, WEIGHTED_K: tl.constexpr,
         WEIGHTED_V: tl.constexpr, QUANTIZED_K: tl.constexpr, QUANTIZED_V: tl.constexpr,
         STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr, SCALE_STRIDE: tl.constexpr,
         PAGE: tl.constexpr, PAGES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
         SEGMENTS: tl.constexpr, K_ROWS: tl.constexpr, SCALE: tl.constexpr,
         SOFTCAP: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
         MASKED: tl.constexpr):  # fmt: skip
    """Tiles low .. high of the keys, past `skip` ones from `skip_from` on."""
    n = tl.arange(0, BN)
    for i in range(low, high):
        block = i + tl.where(i >= skip_from, skip, 0)
        start = block * BN
        keep = start + n < S
        if MASKED:
            k_at, k_segment = places(k_at_ptr, k_segment_ptr, b, start + n, keep, S, K_ROWS,
                                     SEGMENTS)  # fmt: skip
            keep = k_at >= 0
        base, offset = locate(b, k, start, keep, S, table, K, BN, PAGE, PAGES, MASKED)
        key_weights = tile_weights(wk, kw, i, k, K, H, BH, NUM_K)
        key = mixed(keys, key_scales, key_weights, base, offset, keep, NUM_K, STRIDE_K,
                    SCALE_STRIDE, H, BH, WEIGHTED_K, QUANTIZED_K, MASKED, STAGES,
                    q.dtype)  # fmt: skip
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
        value_weights = tile_weights(wv, vw, i, k, K, HV, BHV, NUM_V)
        value = mixed(values, value_scales, value_weights, base, offset, keep, NUM_V, STRIDE_V,
                      SCALE_STRIDE, HV, BHV, WEIGHTED_V, QUANTIZED_V, MASKED, STAGES,
                      q.dtype)  # fmt: skip
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
            BN: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
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
    q_at, q_segment = places(q_at_ptr, q_segment_ptr, b, t, live, T, Q_ROWS, SEGMENTS)
    low, high, clear_low, clear_high = run_of(bounds, b, i, blocks, BOUND_ROWS)
    clear = clear_high - clear_low

    keys, values = (k0, k1, k2, k3), (v0, v1, v2, v3)
    key_scales, value_scales = (ks0, ks1, ks2, ks3), (vs0, vs1, vs2, vs3)
    wk = stream_weights(kw, k, K, H, BH, NUM_K)
    wv = stream_weights(vw, k, K, HV, BHV, NUM_V)
    top = tl.full((BM,), HIDDEN / 2, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, BHV), tl.float32)
    top, total, out = loop(
        clear_low, clear_high, clear_high, 0, q, b, k, S, q_at, k_at_ptr, q_segment,
        k_segment_ptr, table, keys, values, key_scales, value_scales, kw, vw, wk, wv, top, total,
        out, K, H, HV, BH, BHV, NUM_K, NUM_V, WEIGHTED_K, WEIGHTED_V, QUANTIZED_K, QUANTIZED_V,
        STRIDE_K, STRIDE_V, SCALE_STRIDE, PAGE, PAGES, CAUSAL, WINDOW, SEGMENTS, K_ROWS, SCALE,
        SOFTCAP, BN, STAGES, False,
    )  # fmt: skip
    top, total, out = loop(
        low, high - clear, clear_low, clear, q, b, k, S, q_at, k_at_ptr, q_segment,
        k_segment_ptr, table, keys, values, key_scales, value_scales, kw, vw, wk, wv, top, total,
        out, K, H, HV, BH, BHV, NUM_K, NUM_V, WEIGHTED_K, WEIGHTED_V, QUANTIZED_K, QUANTIZED_V,
        STRIDE_K, STRIDE_V, SCALE_STRIDE, PAGE, PAGES, CAUSAL, WINDOW, SEGMENTS, K_ROWS, SCALE,
        SOFTCAP, BN, STAGES, True,
    )  # fmt: skip
    some = total > 0
    total = tl.where(some, total, 1.0)
    tl.store(out_ptr + row[:, None] * HV + dv[None, :],
             (out / total[:, None]).to(out_ptr.dtype.element_ty),
             mask=live[:, None] & (dv < HV)[None, :])  # fmt: skip
    lse = tl.where(some, (top + tl.log2(total)) * LN2, float("-inf"))
    tl.store(lse_ptr + row, lse, mask=live)
