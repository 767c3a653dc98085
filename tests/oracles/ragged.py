"""Ragged attention over pages in NumPy float64: the tests' definition, row by row."""

import numpy as np


def attention(q, sides, weights, rows, *, window=None, scale=None, softcap=None):
    """(out [T, N, H'], lse [T, N]); zero and -inf where nothing is seen.

    Args:
      q: [T, N, H].
      sides: keys and values, of each source numbers [R, S, K, H] in the order of their tokens;
        those from a row's length on are not looked at.
      weights: of both, [J, K, H] or None.
      rows: (start, count, length) of each row.
      window, scale, softcap: of `ragged_attention`.
    """
    q = np.asarray(q, np.float64)
    mixed = []
    for side, weight in zip(sides, weights, strict=True):
        heads, size = side[0].shape[2:]
        weight = np.ones((1, heads, size)) if weight is None else np.asarray(weight, np.float64)
        mixed.append(lambda r, s, side=side, w=weight: sum(
            y * np.asarray(x[r, :s], np.float64) for x, y in zip(side, w, strict=True)
        ))  # fmt: skip
    heads, value_size = sides[1][0].shape[2:]
    out, lse = np.zeros((*q.shape[:2], value_size)), np.full(q.shape[:2], -np.inf)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    for number, (start, count, length) in enumerate(rows):
        if not count or length <= 0:
            continue
        key, value = (x(number, length) for x in mixed)
        grouped = q[start : start + count].reshape(count, heads, -1, q.shape[2])
        score = scale * np.einsum("tkgh,skh->tkgs", grouped, key)
        if softcap is not None:
            score = softcap * np.tanh(score / softcap)
        ago = (length - count + np.arange(count))[:, None] - np.arange(length)  # tokens ago
        seen = (ago >= 0) & (window is None or ago < window)
        some, seen = seen.any(1), seen[:, None, None]
        top = np.where(seen, score, -np.inf).max(3, initial=-1e300, keepdims=True)
        share = np.where(seen, np.exp(np.minimum(score - top, 0)), 0)
        total = share.sum(3, keepdims=True)
        sure = np.where(total > 0, total, 1)
        found = np.einsum("tkgs,skh->tkgh", share / sure, value).reshape(count, -1, value_size)
        sums = (top + np.log(sure))[..., 0].reshape(count, -1)
        places = start + np.flatnonzero(some)
        out[places], lse[places] = found[some], sums[some]
    return out, lse
