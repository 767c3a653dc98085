"""Gradients: one kernel owns a tile of keys and mixes it once, the other a block of queries.

    backward_keys                               backward_queries
    mix key and value of the tile               load q, dout, lse, delta of the block
    for each block of rows that sees it:        for each tile that it sees:
        load q, dout, lse, delta                    mix key and value
        p  = 2^(key.q^T - lse)                      p  = 2^(q.key^T - lse)
        dV^ += p.dout                               ds = p (dout.value^T - delta)
        ds = p (value.dout^T - delta)               dq += ds.key
        dK^ += ds.q                             write scale dq
    write scale dK^ and dV^

`lse` is in base 2 and normalizes p at once; delta = sum(out dout) - dlse is the sum over all keys
that the softmax's Jacobian needs, known before any of them is seen. What dK^ and dV^ owe to each
source is left to the caller, in float32.

Scores are computed twice, once for either side, so that no two programs add to one place: with
atomic additions the gradients would depend on the order in which programs end.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.gpu.kernels.parts import (
    logits,
    mixed,
    places,
    product,
    run_of,
    slope,
    stream_weights,
    tile_weights,
    visible,
)


@triton.jit
@no_type_check
def key_loop(low, high, skip_from, skip, key, value, dkey, dvalue, b, k, T, q_ptr, dout_ptr,
             lse_ptr, delta_ptr, q_at_ptr, q_segment_ptr, k_at, k_segment,
             K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
             BH: tl.constexpr, BHV: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
             SEGMENTS: tl.constexpr, Q_ROWS: tl.constexpr, SCALE: tl.constexpr,
             SOFTCAP: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Blocks low .. high of the rows, past `skip` ones from `skip_from` on, for one key tile."""
    d, dv = tl.arange(0, BH), tl.arange(0, BHV)
    for i in range(low, high):
        r = (i + tl.where(i >= skip_from, skip, 0)) * BM + tl.arange(0, BM)
        t = r // G
        live = t < T
        row = (b.to(tl.int64) * T + t) * (K * G) + k * G + r % G
        q = tl.load(q_ptr + row[:, None] * H + d[None, :], mask=live[:, None] & (d < H)[None, :],
                    other=0)  # fmt: skip
        dout = tl.load(dout_ptr + row[:, None] * HV + dv[None, :],
                       mask=live[:, None] & (dv < HV)[None, :], other=0)  # fmt: skip
        lse = tl.load(lse_ptr + row, mask=live, other=1e30)  # exp2(anything - 1e30) = 0
        delta = tl.load(delta_ptr + row, mask=live, other=0)
        s = product(key, tl.trans(q), tl.zeros((key.shape[0], BM), tl.float32))  # [BN, BM]
        s = logits(s, SCALE, SOFTCAP)
        p = tl.exp2(s - lse[None, :])
        if MASKED:
            q_at, q_segment = places(q_at_ptr, q_segment_ptr, b, t, live, T, Q_ROWS, SEGMENTS)
            seen = visible(q_at[None, :], k_at[:, None], q_segment[None, :], k_segment[:, None],
                           CAUSAL, WINDOW, SEGMENTS)  # fmt: skip
            p = tl.where(seen, p, 0.0)
        dvalue = product(p.to(dout.dtype), dout, dvalue)
        dp = product(value, tl.trans(dout), tl.zeros((key.shape[0], BM), tl.float32))
        ds = p * (dp - delta[None, :])
        if SOFTCAP > 0:
            ds = ds * slope(s, SOFTCAP)
        dkey = product(ds.to(q.dtype), q, dkey)
    return dkey, dvalue


@triton.jit
@no_type_check
def backward_keys(q_ptr, kw, vw, k0, k1, k2, k3, v0, v1, v2, v3, dout_ptr, lse_ptr, delta_ptr,
                  bounds, q_at_ptr, k_at_ptr, q_segment_ptr, k_segment_ptr, T, S,
                  dkey_ptr, dvalue_ptr,
                  K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
                  BH: tl.constexpr, BHV: tl.constexpr, NUM_K: tl.constexpr, NUM_V: tl.constexpr,
                  WEIGHTED_K: tl.constexpr, WEIGHTED_V: tl.constexpr, CAUSAL: tl.constexpr,
                  WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, Q_ROWS: tl.constexpr,
                  K_ROWS: tl.constexpr, BOUND_ROWS: tl.constexpr, SCALE: tl.constexpr,
                  SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """dK^ [B, S, K, H] and dV^ [B, S, K, H'] of a tile of keys. Grid (key tiles, B * K).

    bounds[b, j] = (low, high, clear_low, clear_high) of the row blocks that see key tile j.
    """
    blocks = tl.num_programs(0)
    j = tl.program_id(0)
    bk = tl.program_id(1)
    b, k = bk // K, bk % K
    n = j * BN + tl.arange(0, BN)
    d, dv = tl.arange(0, BH), tl.arange(0, BHV)
    k_at, k_segment = places(k_at_ptr, k_segment_ptr, b, n, n < S, S, K_ROWS, SEGMENTS)
    keep = k_at >= 0
    base = (b.to(tl.int64) * S + j * BN) * K + k
    offset = tl.arange(0, BN) * K
    wk = stream_weights(kw, k, K, H, BH, NUM_K)
    wv = stream_weights(vw, k, K, HV, BHV, NUM_V)
    keys, values = (k0, k1, k2, k3), (v0, v1, v2, v3)
    key = mixed(keys, keys, wk, base, offset, keep, NUM_K, H, 1, H, BH, WEIGHTED_K, False, True,
                STAGES, q_ptr.dtype.element_ty)  # fmt: skip
    value = mixed(values, values, wv, base, offset, keep, NUM_V, HV, 1, HV, BHV, WEIGHTED_V, False,
                  True, STAGES, q_ptr.dtype.element_ty)  # fmt: skip
    low, high, clear_low, clear_high = run_of(bounds, b, j, blocks, BOUND_ROWS)
    clear = clear_high - clear_low
    dkey = tl.zeros((BN, BH), tl.float32)
    dvalue = tl.zeros((BN, BHV), tl.float32)
    # Blocks that see all of the tile first, in a loop of their own without a mask; then the others,
    # which lie before and after them.
    dkey, dvalue = key_loop(
        clear_low, clear_high, clear_high, 0, key, value, dkey, dvalue, b, k, T, q_ptr, dout_ptr,
        lse_ptr, delta_ptr, q_at_ptr, q_segment_ptr, k_at, k_segment, K, G, H, HV, BH, BHV,
        CAUSAL, WINDOW, SEGMENTS, Q_ROWS, SCALE, SOFTCAP, BM, False,
    )  # fmt: skip
    dkey, dvalue = key_loop(
        low, high - clear, clear_low, clear, key, value, dkey, dvalue, b, k, T, q_ptr, dout_ptr,
        lse_ptr, delta_ptr, q_at_ptr, q_segment_ptr, k_at, k_segment, K, G, H, HV, BH, BHV,
        CAUSAL, WINDOW, SEGMENTS, Q_ROWS, SCALE, SOFTCAP, BM, True,
    )  # fmt: skip
    row = base + offset
    tl.store(dkey_ptr + row[:, None] * H + d[None, :], dkey * SCALE,
             mask=(n < S)[:, None] & (d < H)[None, :])  # fmt: skip
    tl.store(dvalue_ptr + row[:, None] * HV + dv[None, :], dvalue,
             mask=(n < S)[:, None] & (dv < HV)[None, :])  # fmt: skip


@triton.jit
@no_type_check
def query_loop(low, high, skip_from, skip, q, dout, lse, delta, dq, b, k, S, q_at, k_at_ptr,
               q_segment, k_segment_ptr, keys, values, kw, vw, wk, wv,
               K: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, BH: tl.constexpr,
               BHV: tl.constexpr, NUM_K: tl.constexpr, NUM_V: tl.constexpr,
               WEIGHTED_K: tl.constexpr, WEIGHTED_V: tl.constexpr, CAUSAL: tl.constexpr,
               WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, K_ROWS: tl.constexpr,
               SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BN: tl.constexpr,
               STAGES: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Tiles low .. high of the keys, past `skip` ones from `skip_from` on, for one row block."""
    n = tl.arange(0, BN)
    offset = n * K
    for i in range(low, high):
        start = (i + tl.where(i >= skip_from, skip, 0)) * BN
        keep = start + n < S
        if MASKED:
            k_at, k_segment = places(k_at_ptr, k_segment_ptr, b, start + n, keep, S, K_ROWS,
                                     SEGMENTS)  # fmt: skip
            keep = k_at >= 0
        base = (b.to(tl.int64) * S + start) * K + k
        key_weights = tile_weights(wk, kw, i, k, K, H, BH, NUM_K)
        key = mixed(keys, keys, key_weights, base, offset, keep, NUM_K, H, 1, H, BH, WEIGHTED_K,
                    False, MASKED, STAGES, q.dtype)  # fmt: skip
        value_weights = tile_weights(wv, vw, i, k, K, HV, BHV, NUM_V)
        value = mixed(values, values, value_weights, base, offset, keep, NUM_V, HV, 1, HV, BHV,
                      WEIGHTED_V, False, MASKED, STAGES, q.dtype)  # fmt: skip
        s = product(q, tl.trans(key), tl.zeros((q.shape[0], BN), tl.float32))
        s = logits(s, SCALE, SOFTCAP)
        p = tl.exp2(s - lse[:, None])
        if MASKED:
            seen = visible(q_at[:, None], k_at[None, :], q_segment[:, None], k_segment[None, :],
                           CAUSAL, WINDOW, SEGMENTS)  # fmt: skip
            p = tl.where(seen, p, 0.0)
        dp = product(dout, tl.trans(value), tl.zeros((q.shape[0], BN), tl.float32))
        ds = p * (dp - delta[:, None])
        if SOFTCAP > 0:
            ds = ds * slope(s, SOFTCAP)
        dq = product(ds.to(q.dtype), key, dq)
    return dq


@triton.jit
@no_type_check
def backward_queries(q_ptr, kw, vw, k0, k1, k2, k3, v0, v1, v2, v3, dout_ptr, lse_ptr, delta_ptr,
                     bounds, q_at_ptr, k_at_ptr, q_segment_ptr, k_segment_ptr, T, S, dq_ptr,
                     K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
                     BH: tl.constexpr, BHV: tl.constexpr, NUM_K: tl.constexpr,
                     NUM_V: tl.constexpr, WEIGHTED_K: tl.constexpr, WEIGHTED_V: tl.constexpr,
                     CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
                     Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr, BOUND_ROWS: tl.constexpr,
                     SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dq [B, T, N, H] of a block of rows; grid and bounds as in `forward`."""
    blocks = tl.num_programs(0)
    # The last rows see most keys under a causal mask: the longest programs begin first.
    i = blocks - 1 - tl.program_id(0)
    bk = tl.program_id(1)
    b, k = bk // K, bk % K
    r = i * BM + tl.arange(0, BM)
    t = r // G
    live = t < T
    d, dv = tl.arange(0, BH), tl.arange(0, BHV)
    row = (b.to(tl.int64) * T + t) * (K * G) + k * G + r % G
    q = tl.load(q_ptr + row[:, None] * H + d[None, :], mask=live[:, None] & (d < H)[None, :],
                other=0)  # fmt: skip
    dout = tl.load(dout_ptr + row[:, None] * HV + dv[None, :],
                   mask=live[:, None] & (dv < HV)[None, :], other=0)  # fmt: skip
    lse = tl.load(lse_ptr + row, mask=live, other=1e30)
    delta = tl.load(delta_ptr + row, mask=live, other=0)
    q_at, q_segment = places(q_at_ptr, q_segment_ptr, b, t, live, T, Q_ROWS, SEGMENTS)
    wk = stream_weights(kw, k, K, H, BH, NUM_K)
    wv = stream_weights(vw, k, K, HV, BHV, NUM_V)
    keys, values = (k0, k1, k2, k3), (v0, v1, v2, v3)
    low, high, clear_low, clear_high = run_of(bounds, b, i, blocks, BOUND_ROWS)
    clear = clear_high - clear_low
    dq = tl.zeros((BM, BH), tl.float32)
    dq = query_loop(
        clear_low, clear_high, clear_high, 0, q, dout, lse, delta, dq, b, k, S, q_at, k_at_ptr,
        q_segment, k_segment_ptr, keys, values, kw, vw, wk, wv, K, H, HV, BH, BHV, NUM_K, NUM_V,
        WEIGHTED_K, WEIGHTED_V, CAUSAL, WINDOW, SEGMENTS, K_ROWS, SCALE, SOFTCAP, BN, STAGES, False,
    )  # fmt: skip
    dq = query_loop(
        low, high - clear, clear_low, clear, q, dout, lse, delta, dq, b, k, S, q_at, k_at_ptr,
        q_segment, k_segment_ptr, keys, values, kw, vw, wk, wv, K, H, HV, BH, BHV, NUM_K, NUM_V,
        WEIGHTED_K, WEIGHTED_V, CAUSAL, WINDOW, SEGMENTS, K_ROWS, SCALE, SOFTCAP, BN, STAGES, True,
    )  # fmt: skip
    tl.store(dq_ptr + row[:, None] * H + d[None, :], (dq * SCALE).to(dq_ptr.dtype.element_ty),
             mask=live[:, None] & (d < H)[None, :])  # fmt: skip
