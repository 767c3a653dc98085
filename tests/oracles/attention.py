"""Attention and its gradients in NumPy float64, row by row: the tests' definition; and the plain
formula in a narrow type, whose error is the measure of everyone else's."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np


def visible(b, t, s, num_queries, num_keys, o) -> bool:
    """Whether query t of row b sees key s, word by word from the documentation."""
    length = num_keys if o.get("kv_lengths") is None else int(o["kv_lengths"][b])
    at_key = s if o.get("kv_positions") is None else int(o["kv_positions"][b][s])
    at_query = length - num_queries + t
    if o.get("q_positions") is not None:
        at_query = int(o["q_positions"][b][t])
    if s >= length or at_key < 0:
        return False
    if o.get("causal", True) and at_key > at_query:
        return False
    if o.get("window") is not None and at_query - at_key >= o["window"]:
        return False
    if o.get("q_segment_ids") is not None:
        ours, theirs = int(o["q_segment_ids"][b][t]), int(o["kv_segment_ids"][b][s])
        return ours == theirs and ours >= 0
    return True


def present(b, s, o) -> bool:
    """Whether the memory of key s of row b may be read."""
    lengths, positions = o.get("kv_lengths"), o.get("kv_positions")
    return (lengths is None or s < lengths[b]) and (positions is None or positions[b][s] >= 0)


def attention(q, keys, values, key_weights, value_weights, options, dout=None, dlse=None):
    """Output and lse, and with cotangents the gradients of q, keys, values and both weights."""
    o = {k: np.asarray(v) if hasattr(v, "shape") else v for k, v in options.items()}
    wide = lambda x: np.asarray(x, np.float64)  # noqa: E731
    q = wide(q)
    batch, num_queries, num_heads, size = q.shape
    num_keys, kv_heads = keys[0].shape[1:3]
    keep = np.array([[present(b, s, o) for s in range(num_keys)] for b in range(batch)])
    keys, values = (
        np.stack([np.where(keep[..., None, None], wide(x), 0) for x in side])
        for side in (keys, values)
    )
    a = np.ones((1, kv_heads, size)) if key_weights is None else wide(key_weights)
    c = np.ones((1, kv_heads, values.shape[-1])) if value_weights is None else wide(value_weights)
    key, value = np.einsum("jkh,jbskh->bskh", a, keys), np.einsum("jkh,jbskh->bskh", c, values)
    scale = size**-0.5 if o.get("scale") is None else o["scale"]
    cap = o.get("softcap")
    out = np.zeros((batch, num_queries, num_heads, value.shape[-1]))
    lse = np.full((batch, num_queries, num_heads), -np.inf)
    dq, dkey, dvalue = np.zeros_like(q), np.zeros_like(key), np.zeros_like(value)
    for b, t, n in np.ndindex(batch, num_queries, num_heads):
        k = n // (num_heads // kv_heads)
        seen = [s for s in range(num_keys) if visible(b, t, s, num_queries, num_keys, o)]
        if not seen:
            continue
        score = scale * key[b, seen, k] @ q[b, t, n]
        slope = 1.0
        if cap is not None:
            slope, score = 1 - np.tanh(score / cap) ** 2, cap * np.tanh(score / cap)
        lse[b, t, n] = score.max() + np.log(np.exp(score - score.max()).sum())
        p = np.exp(score - lse[b, t, n])
        out[b, t, n] = p @ value[b, seen, k]
        if dout is not None:
            g = wide(dout[b, t, n])
            dscore = p * (value[b, seen, k] @ g - out[b, t, n] @ g + wide(dlse[b, t, n]))
            dscore = dscore * slope * scale
            dq[b, t, n] = dscore @ key[b, seen, k]
            dkey[b, seen, k] += np.outer(dscore, q[b, t, n])
            dvalue[b, seen, k] += np.outer(p, g)
    if dout is None:
        return out, lse
    dkeys = tuple(w * dkey for w in a)
    dvalues = tuple(w * dvalue for w in c)
    da = None if key_weights is None else np.einsum("jbskh,bskh->jkh", keys, dkey)
    dc = None if value_weights is None else np.einsum("jbskh,bskh->jkh", values, dvalue)
    return out, lse, (dq, dkeys, dvalues, da, dc)


def visibility(shape, options):
    """bool [B, T, S]."""
    batch, num_queries, num_keys = shape
    where = [
        [[visible(b, t, s, num_queries, num_keys, options) for s in range(num_keys)]
         for t in range(num_queries)]
        for b in range(batch)
    ]  # fmt: skip
    return np.array(where)


def naive(seen, q, keys, values, key_weights, value_weights):
    """The plain formula, every step in the dtype of q: whose error a kernel may have twice.

    Every row of `seen` [B, T, S] must see something.
    """
    groups = q.shape[2] // keys[0].shape[2]

    def mix(sources, weights):
        if weights is not None:
            sources = [(w * x).astype(q.dtype) for w, x in zip(weights, sources, strict=True)]
        return jnp.repeat(functools.reduce(operator.add, sources), groups, axis=2)

    key, value = mix(keys, key_weights), mix(values, value_weights)
    score = jnp.einsum("btnh,bsnh->bnts", q, key) * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    score = jnp.where(seen[:, None], score, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(score, axis=-1), value)
