"""The decoder in NumPy float64, token by token, written from the formulas alone.

A layout is a plain list with one `Row` per layer. Nothing here comes from the library, except that
`build` puts the drawn parameters where the library keeps them.
"""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from flax import nnx

import fusedkv_jax as fkv
from fusedkv_jax.layouts import runs

EPS = 1e-6
THETA = 10_000.0


@dataclass(frozen=True)
class Row:
    """One layer's (layer, weight) lists: what its keys and its values are the weighted sum of.

    A layer that names itself has a projection of its own, and stores the sum. One that `serves`
    stores its projection for others, though its attention reads the layers it names. Weights
    broadcast against [K, H].
    """

    keys: list
    values: list
    window: int | None = None
    kv_norm: bool = False
    serves: bool = False


@dataclass
class Drawn:
    """Parameters of a whole decoder in plain form, every layer with everything."""

    embedding: np.ndarray
    final_norm: np.ndarray
    head: np.ndarray
    layers: list = field(default_factory=list)


def small_config(layout, **changes):
    """Six layers, four query heads over two KV heads of eight channels."""
    fields = dict(
        vocab_size=37, num_layers=6, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=40
    )
    return fkv.ModelConfig(layout=layout, **fields | changes)


def random_decoder(config, seed=0):
    """A decoder whose every array is drawn, large enough for every part to matter."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(lambda: fkv.Decoder(config, rngs=nnx.Rngs(0))))

    def draw(path, variable):
        shape = variable.get_value()
        array = rng.normal(size=shape.shape)
        if path[-1] == "scale":
            array = 1 + 0.3 * array
        elif path[-1] == "embedding" or path[0] == "mixing":
            array *= 0.7
        else:
            array *= 0.3 if path[-1].endswith("bias") else config.d_model**-0.5
        return variable.replace(jnp.asarray(array, shape.dtype))

    flat = [(path, draw(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def draw(config, seed=0):
    """Parameters large enough for every part to matter; norm scales differ from one."""
    rng = np.random.default_rng(seed)
    d, n, k = config.d_model, config.num_heads, config.num_kv_heads
    h, f, v = config.head_dim, config.d_ff, config.vocab_size

    def matrix(*shape, fan_in):
        return (rng.normal(size=shape) / fan_in**0.5).astype(np.float32)

    def scale(size):
        return (1 + 0.3 * rng.normal(size=size)).astype(np.float32)

    layers = [
        dict(
            attention_norm=scale(d),
            kv_norm=scale(d),
            q_proj=matrix(d, n, h, fan_in=d),
            k_proj=matrix(d, k, h, fan_in=d),
            v_proj=matrix(d, k, h, fan_in=d),
            q_norm=scale(h),
            k_norm=scale(h),
            o_proj=matrix(n, h, d, fan_in=n * h),
            mlp_norm=scale(d),
            gate=matrix(d, f, fan_in=d),
            up=matrix(d, f, fan_in=d),
            down=matrix(f, d, fan_in=f),
        )
        for _ in range(config.num_layers)
    ]
    return Drawn(matrix(v, d, fan_in=1), scale(d), matrix(d, v, fan_in=d), layers)


def build(config, drawn, fusion=()):
    """Our decoder with the drawn parameters, and stream weights as they are stored."""
    abstract = nnx.eval_shape(lambda: fkv.Decoder(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    filled = []
    for path, variable in nnx.to_flat_state(state):
        name = path[-2] if path[-1] == "scale" else path[-1]
        if path[0] == "mixing":
            value = fusion[path[2]]
        elif path[0] == "runs":
            layers = runs(config.kv_layout)[path[1]].layers(path[2])
            value = np.stack([drawn.layers[i][name] for i in layers])
        else:
            value = getattr(drawn, name)
        value = jnp.asarray(value, variable.get_value().dtype)
        assert value.shape == variable.get_value().shape, (path, value.shape)
        filled.append((path, variable.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def rms_norm(x, scale):
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * scale


def rotated(x, position, theta=THETA):
    """Half-split rotation of heads [heads, H] at one position."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-2 * np.arange(half) / x.shape[-1])
    a, b = x[:, :half], x[:, half:]
    turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    return np.concatenate(turned, axis=-1)


def attention(q, keys, values):
    """One token's queries [N, H] over stored keys and values [S, K, H]; zero without any."""
    out = np.zeros((q.shape[0], values.shape[-1]))
    group = q.shape[0] // keys.shape[1]
    for n in range(q.shape[0]) if len(keys) else ():
        scores = keys[:, n // group] @ q[n] / np.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        out[n] = weights / weights.sum() @ values[:, n // group]
    return out


def logits(drawn, rows, tokens, positions=None):
    """Next-token logits [T, V] of one sequence, every token through every layer in turn.

    A layer below its source sees that source's earlier tokens only: the newest is not there yet.
    """
    keys, values = ([[] for _ in rows] for _ in range(2))
    positions = range(len(tokens)) if positions is None else positions
    result = []
    for t, (token, position) in enumerate(zip(tokens, positions, strict=True)):
        x = drawn.embedding[token].astype(np.float64)
        for i, (p, row) in enumerate(zip(drawn.layers, rows, strict=True)):
            x = _layer(p, row, i, t, x, position, keys, values)
        result.append(rms_norm(x, drawn.final_norm) @ drawn.head)
    return np.stack(result)


def _layer(p, row, i, t, x, position, keys, values):
    normed = rms_norm(x, p["attention_norm"])
    q = rotated(rms_norm(np.einsum("d,dnh->nh", normed, p["q_proj"]), p["q_norm"]), position)
    source = rms_norm(x, p["kv_norm"]) if row.kv_norm else normed
    key = rms_norm(np.einsum("d,dkh->kh", source, p["k_proj"]), p["k_norm"])
    own = {"k": rotated(key, position), "v": np.einsum("d,dkh->kh", source, p["v_proj"])}
    read = []
    for kind, stored, terms in (("k", keys, row.keys), ("v", values, row.values)):
        if i in dict(terms):
            new = sum(w * (own[kind] if j == i else stored[j][t]) for j, w in terms)
            stored[i].append(new)
            terms = [(i, 1.0)]
        elif row.serves:
            stored[i].append(own[kind])
        streams = [w * np.reshape(stored[j], (-1, *own[kind].shape)) for j, w in terms]
        oldest = 0 if row.window is None else max(0, t + 1 - row.window)
        read.append(sum(streams)[oldest:])
    x = x + np.einsum("nh,nhd->d", attention(q, *read), p["o_proj"])
    normed = rms_norm(x, p["mlp_norm"])
    gate, up = normed @ p["gate"], normed @ p["up"]
    return x + (gate / (1 + np.exp(-gate)) * up) @ p["down"]
