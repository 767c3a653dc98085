"""A decoder in NumPy float64, token by token, whose tokens see what a policy lets them see.

Built on the plain functions of `tests.oracles.decoder`; nothing comes from the library.
"""

from dataclasses import dataclass, field

import numpy as np

from tests.oracles.decoder import rms_norm, rotated


@dataclass
class Policy:
    """Everything is seen, at its own position; subclasses see less."""

    probabilities: dict = field(default_factory=dict)  # (layer, token, head) -> {position: p}

    def seen(self, layer, head, token):
        """Positions that a KV head of a layer sees, in any order; the token itself included."""
        return list(range(token + 1))

    def place(self, token, seen):
        """Position of the query, and of each token that it sees."""
        return token, {position: position for position in seen}

    def turned(self, layer, heads, place):
        """Queries or keys of a layer [heads, H], rotated to a position."""
        return rotated(heads, place)

    def watch(self, layer, token, head, found):
        self.probabilities[layer, token, head] = found

    def step(self, token):
        """After a token has passed all layers."""


def logits(drawn, rows, tokens, policy):
    """Next-token logits [T, V] of one sequence."""
    keys, values = ([[] for _ in rows] for _ in range(2))
    result = []
    for t, token in enumerate(tokens):
        x = drawn.embedding[token].astype(np.float64)
        for i, (p, row) in enumerate(zip(drawn.layers, rows, strict=True)):
            x = _layer(p, row, i, t, x, keys, values, policy)
        result.append(rms_norm(x, drawn.final_norm) @ drawn.head)
        policy.step(t)
    return np.stack(result)


def _layer(p, row, i, t, x, keys, values, policy):
    normed = rms_norm(x, p["attention_norm"])
    q = rms_norm(np.einsum("d,dnh->nh", normed, p["q_proj"]), p["q_norm"])
    if i in dict(row.keys):
        keys[i].append(rms_norm(np.einsum("d,dkh->kh", normed, p["k_proj"]), p["k_norm"]))
    if i in dict(row.values):
        values[i].append(np.einsum("d,dkh->kh", normed, p["v_proj"]))
    kv_heads = p["k_proj"].shape[1]
    group = len(q) // kv_heads
    out = np.zeros_like(q)
    for n in range(len(q)):
        head = n // group
        seen = policy.seen(i, head, t)
        own, places = policy.place(t, seen)
        scores, read = [], []
        for s in seen:
            # Weights on keys are the same within a rotary pair, so that they may come first.
            key = sum(
                (np.broadcast_to(w, (kv_heads, q.shape[1])) * keys[j][s])[head] for j, w in row.keys
            )
            value = sum(
                (np.broadcast_to(w, (kv_heads, q.shape[1])) * values[j][s])[head]
                for j, w in row.values
            )
            turned = policy.turned(i, key[None], places[s])[0]
            scores.append(policy.turned(i, q[n : n + 1], own)[0] @ turned / np.sqrt(q.shape[1]))
            read.append(value)
        weights = np.exp(np.array(scores) - max(scores))
        weights /= weights.sum()
        policy.watch(i, t, n, dict(zip(seen, weights, strict=True)))
        out[n] = weights @ np.stack(read)
    x = x + np.einsum("nh,nhd->d", out, p["o_proj"])
    normed = rms_norm(x, p["mlp_norm"])
    gate, up = normed @ p["gate"], normed @ p["up"]
    return x + (gate / (1 + np.exp(-gate)) * up) @ p["down"]
