"""Conversion of a pretrained decoder to a layout that caches less, by least squares.

A layer that loses its keys and values reads those of others, which are other numbers. What its
layout's weights cannot express is absorbed into matrices that the layer keeps, and the
architecture stays as it is:

- the query heads move to the KV head whose streams predict theirs best (an assignment problem);
- a complex factor per rotary pair, which commutes with the rotation, goes into the queries;
- the map from the values that are read to those that were goes into the output projection;
- attention's output projection, and then the feed-forward's, are fitted to bring the hidden states
  back to the original's, layer after layer upwards, so that each corrects those below it.

No gradient is needed: a few thousand tokens and one pass through both models.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int
from scipy.optimize import linear_sum_assignment

from fusedkv_jax.cache import Piece
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.interop.huggingface import load_huggingface
from fusedkv_jax.interop.huggingface_config import with_layout
from fusedkv_jax.interop.huggingface_names import places, to_theirs
from fusedkv_jax.layouts import KINDS, KVLayout, LayerKV, Stream
from fusedkv_jax.layouts.algebra import Kind
from fusedkv_jax.model import Decoder
from fusedkv_jax.model.attention import Attention
from fusedkv_jax.model.mixing import chains
from fusedkv_jax.model.parameters import FusionWeight
from fusedkv_jax.model.rotary import Rotation
from fusedkv_jax.model.transform import Layer, layers_of, rebuild

_Streams = dict[tuple[Kind, int], Array]  # of the layers, or their weights, by kind and layer
# Real weights [J, pairs], complex factors [pairs], and the share of the square that is explained.
_KeyFit = tuple[np.ndarray | None, np.ndarray, float]
_ValueFit = tuple[np.ndarray | None, float]  # weights [J, H], and the share

RIDGE = 0.01  # of the mean square of the inputs: how firmly a fitted matrix stays where it was
_ANGLES = 64  # a phase is sought among so many
_ROUNDS = 8  # of fitting a map, then the channel weights before it


def fit(
    model: Decoder, layout: KVLayout | str, tokens: Int[Array, "B T"], *, ridge: float = RIDGE
) -> Decoder:
    """The model under another layout, as near to it as least squares bring it.

    Args:
        model: a decoder whose layers all have their own keys and values, with norms before its
            branches.
        layout: any without cycles whose layers either cache both streams or neither, with
            weights per channel or none.
        tokens: int32 text to fit on; some thousand tokens, whole sequences.
        ridge: how firmly matrices stay what they were, relative to their inputs' mean square.

    Raises:
        ValueError: a model or a layout that is not of this kind.
    """
    config = with_layout(model.config, layout)
    _check(model.config, config)
    start = _start(model, config)
    old, new = layers_of(model), layers_of(start)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = y = model.embed(tokens)
    streams: _Streams = {}
    weights: _Streams = {}
    for i, layer in enumerate(config.kv_layout.layers):
        rotation = _rotation(model, i, positions)
        window = layer.window
        q, own = _project(*old[i], x, rotation)
        heads = _Heads(q, own["key"], own["value"])
        after, x_next = _finish(*old[i], x, heads, window)
        if layer.caches and y is x:  # nothing below has changed
            streams["key", i], streams["value", i] = heads.keys, heads.values
            x = y = x_next
            continue
        graph, params = new[i]
        if not layer.caches:
            params, found = _read_others((graph, params), layer, streams, heads, config)
            weights |= {(kind, i): w for kind, w in found.items()}
        q, own = _project(graph, params, y, rotation)
        streams |= {(kind, i): array for kind, array in own.items()}
        keys, values = (_rebuilt(kind, layer.stream(kind), i, streams, weights) for kind in KINDS)
        heads = _Heads(q, keys, values)
        params = _fit_output((graph, params), y, heads, window, after, ridge)
        params = _fit_feed_forward((graph, params), y, heads, window, x_next, ridge)
        new[i] = graph, params
        y, x = _finish(graph, params, y, heads, window)[1], x_next
    return _assembled(start, new, weights)


def _check(old: ModelConfig, new: ModelConfig) -> None:
    block = old.block
    if old.mla is not None or block.norm_placement != "pre" or block.parallel:
        raise ValueError("only models with separate keys and values and norms before are fitted")
    if any(not (part.own and not part.sources) for part in _streams(old.kv_layout)):
        raise ValueError("layers of the model share keys or values already; fit an original")
    if new.kv_layout.is_cyclic:
        raise ValueError("the layout is cyclic; choose one whose layers read layers below them")
    for i, layer in enumerate(new.kv_layout.layers):
        for part in (layer.key, layer.value):
            if layer.key.own != layer.value.own or part.own and part.sources or layer.kv_norm:
                raise ValueError(f"layer {i}: only layers that cache both streams or none")
            if part.weights not in (None, "channel") or part.mixing.parameterization != "direct":
                raise ValueError(f"layer {i}: weights are fitted per channel, and stored directly")


def _streams(layout: KVLayout) -> list[Stream]:
    return [layer.stream(kind) for layer in layout.layers for kind in KINDS]


def _start(model: Decoder, config: ModelConfig) -> Decoder:
    """The parts of the model that the layout has a place for."""
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = variable[...]
        for index, name, entry in places(model.config, path):
            tensors[name] = to_theirs(entry, np.asarray(value if index is None else value[index]))
    return load_huggingface(tensors, config.kv_layout, config=model.config, rope_interleave=False)


def _rotation(model: Decoder, layer: int, positions: Array) -> Rotation:
    rotation, kinds = model.rotation(positions), model.config.rope_kinds
    if len(kinds) == 1:
        return rotation
    kind = kinds.index(model.config.layer_ropes[layer])
    cos, sin = rotation
    return cos[kind], sin[kind]


# One layer of either model, computed in pieces.


class _Heads(NamedTuple):
    """What the attention of a layer multiplies, [B, T, heads, H] each."""

    q: Array
    keys: Array
    values: Array

    def pieces(self, window: int | None) -> tuple[Piece, ...]:
        """Keys and values as a block of the model reads them."""
        return (Piece((self.keys,), (self.values,), {"causal": True, "window": window}),)


@functools.partial(jax.jit, static_argnums=0)
def _project(
    graph: nnx.GraphDef, params: nnx.State, x: Array, rotation: Rotation
) -> tuple[Array, dict[Kind, Array]]:
    return nnx.merge(graph, params).project(x, rotation)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _finish(
    graph: nnx.GraphDef, params: nnx.State, x: Array, heads: _Heads, window: int | None
) -> tuple[Array, Array]:
    """Hidden states after attention, and after the layer."""
    block = nnx.merge(graph, params)
    out, _ = block.attend(heads.q, heads.pieces(window), {"key": None, "value": None})
    return x + out * block.config.residual_scale, block.finish(x, out)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _context(graph: nnx.GraphDef, params: nnx.State, heads: _Heads, window: int | None) -> Array:
    block = nnx.merge(graph, params)
    pieces = heads.pieces(window)
    return block.attention.context(heads.q, pieces, {"key": None, "value": None})[0]


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graph: nnx.GraphDef, params: nnx.State, x: Array) -> Array:
    """What enters the feed-forward's last matrix."""
    block = nnx.merge(graph, params)
    return block.mlp.hidden(block.mlp_norm(x))


def _rebuilt(kind: Kind, stream: Stream, layer: int, streams: _Streams, weights: _Streams) -> Array:
    if stream.own:
        return streams[kind, layer]
    sources = [streams[kind, j] for j in stream.sources]
    if stream.weights is None:
        return sources[0]
    w = weights[kind, layer]
    w = jnp.concatenate([w, w], axis=-1) if kind == "key" else w
    terms = (one * source for one, source in zip(w, sources, strict=True))
    return functools.reduce(operator.add, terms)


# The fits.


def _read_others(
    block_parts: Layer, layer: LayerKV, streams: _Streams, wanted: _Heads, config: ModelConfig
) -> tuple[nnx.State, dict[Kind, Array]]:
    """Queries of a layer that reads others, and the stored weights [J, ...] of its streams."""
    keys, values = (
        [np.asarray(streams[kind, j], np.float32) for j in layer.stream(kind).sources]
        for kind in KINDS
    )
    target_keys, target_values = (
        np.asarray(array, np.float32) for array in (wanted.keys, wanted.values)
    )
    heads = config.kv_heads
    rotated = not config.qk_norm  # a norm stands between the projection and the rotation
    fits: dict[tuple[int, int], tuple[_KeyFit, _ValueFit]] = {}
    gain = np.zeros((heads, heads))
    for g in range(heads):  # of the layer
        for h in range(heads):  # of what it reads
            key = _fit_keys(
                target_keys[:, :, g], [k[:, :, h] for k in keys], layer.key.weights, rotated
            )
            value = _fit_values(
                target_values[:, :, g], [v[:, :, h] for v in values], layer.value.weights
            )
            fits[g, h] = key, value
            gain[g, h] = key[-1] + value[-1]
    assigned = linear_sum_assignment(gain, maximize=True)[1]
    order = np.argsort(assigned)  # which head of the layer comes to each head that is read
    chosen = [fits[g, h] for h, g in enumerate(order)]
    factors = np.stack([key[1] for key, _ in chosen])
    block = nnx.merge(*block_parts)
    assert isinstance(block.attention, Attention)  # `_check` refuses latent ones
    _move_heads(block.attention, order, factors)
    found: dict[Kind, Array] = {}
    if layer.key.weights:
        found["key"] = jnp.asarray(
            np.stack([w for (w, *_), _ in chosen if w is not None], 1), jnp.float32
        )
    if layer.value.weights:
        found["value"] = jnp.asarray(
            np.stack([w for _, (w, _) in chosen if w is not None], 1), jnp.float32
        )
    return nnx.split(block)[1], found


def _fit_keys(
    target: np.ndarray, sources: Sequence[np.ndarray], weights: str | None, rotated: bool
) -> _KeyFit:
    """(real weights [J, pairs], complex factors [pairs], share of the square explained)."""
    half = target.shape[-1] // 2
    z = (target[..., :half] + 1j * target[..., half:]).reshape(-1, half)
    terms = [(s[..., :half] + 1j * s[..., half:]).reshape(-1, half) for s in sources]
    gram = np.array([[np.sum((a.conj() * b).real, 0) for b in terms] for a in terms])
    products = np.array([np.sum(a.conj() * z, 0) for a in terms])  # [J, pairs]
    gram = np.moveaxis(gram, -1, 0) + 1e-6 * np.eye(len(terms)) * gram.mean()
    if weights is None:
        factors = products[0] / gram[:, 0, 0]
        factors = factors if rotated else np.ones_like(factors)
        lost = np.sum(np.abs(z - factors * terms[0]) ** 2)
        return None, factors, 1 - lost / np.sum(np.abs(z) ** 2)
    phases = np.exp(1j * np.pi * np.arange(_ANGLES) / _ANGLES) if rotated else np.ones(1)
    parts = np.real(phases[:, None, None].conj() * products)  # [angles, J, pairs]
    solved = np.linalg.solve(gram[None], np.moveaxis(parts, 1, 2)[..., None])[..., 0]
    explained = np.sum(solved * np.moveaxis(parts, 1, 2), -1)  # [angles, pairs]
    best = explained.argmax(0)
    pairs = np.arange(half)
    share = explained[best, pairs].sum() / np.sum(np.abs(z) ** 2)
    return solved[best, pairs].T, phases[best], share


def _fit_values(
    target: np.ndarray, sources: Sequence[np.ndarray], weights: str | None
) -> _ValueFit:
    """(channel weights [J, H] before a map that the output projection takes, share explained)."""
    v = target.reshape(-1, target.shape[-1])
    terms = [s.reshape(-1, s.shape[-1]) for s in sources]
    gram = [[a.T @ b for b in terms] for a in terms]
    products, count, channels = [a.T @ v for a in terms], len(terms), v.shape[-1]
    ratios = [np.linspace(1, 0, channels), np.linspace(0, 1, channels)]
    w = np.stack([ratios[j % 2] + 0.1 for j in range(count)]) if weights else np.ones((1, channels))
    small = 1e-4 * np.trace(gram[-1][-1]) / channels * np.eye(channels)

    def solve_map(w: np.ndarray) -> tuple[np.ndarray, float]:
        left = sum(np.outer(w[j], w[k]) * gram[j][k] for j in range(count) for k in range(count))
        right = sum(w[j][:, None] * products[j] for j in range(count))
        matrix = np.linalg.solve(left + small, right)
        return matrix, float(np.sum(matrix * right))

    matrix, explained = solve_map(w)
    for _ in range(_ROUNDS if weights else 0):
        square = matrix @ matrix.T
        left = np.block([[gram[j][k] * square for k in range(count)] for j in range(count)])
        right = np.concatenate([np.sum(matrix * products[j], axis=1) for j in range(count)])
        left += 1e-6 * np.trace(left) / len(left) * np.eye(len(left))
        w = np.linalg.solve(left, right).reshape(count, channels)
        matrix, explained = solve_map(w)
    return (w if weights else None), explained / float(np.sum(v * v))


def _move_heads(attention: Attention, order: np.ndarray, factors: np.ndarray) -> None:
    """Query heads go to other KV heads; their rotary pairs times conjugate factors [K, h]."""
    heads = len(order)

    def moved(array: Array, axis: int) -> np.ndarray:
        shape = array.shape
        apart = np.asarray(array).reshape(*shape[:axis], heads, -1, *shape[axis + 1 :])
        return np.take(apart, order, axis=axis).reshape(shape)

    turn = np.repeat(factors.conj(), attention.q_proj[...].shape[-2] // heads, axis=0)

    def turned(array: np.ndarray) -> Array:
        a, b = np.split(array, 2, axis=-1)
        z = (a + 1j * b) * turn
        return jnp.asarray(np.concatenate([z.real, z.imag], -1), array.dtype)

    for name, axis in (("q_proj", 1), ("q_bias", 0)):
        parameter = getattr(attention, name)
        if parameter is not None:
            parameter.set_value(turned(moved(parameter[...], axis)))
    attention.o_proj.set_value(jnp.asarray(moved(attention.o_proj[...], 0)))


def _fit_output(
    layer: Layer, y: Array, heads: _Heads, window: int | None, wanted: Array, ridge: float
) -> nnx.State:
    """Attention's output projection, for hidden states `wanted` after attention."""
    context = _context(*layer, heads, window)
    block = nnx.merge(*layer)
    assert isinstance(block.attention, Attention)
    out = block.attention.o_proj
    shape = out[...].shape
    bias = 0 if block.attention.o_bias is None else block.attention.o_bias[...]
    target = (wanted - y) / block.config.residual_scale - bias
    flat = out[...].reshape(-1, shape[-1])
    # The values are others now: where it was is no better than nothing.
    fitted = _nearest(context.reshape(-1, flat.shape[0]), target, flat * 0, ridge)
    out.set_value(jnp.asarray(fitted.reshape(shape), out[...].dtype))
    return nnx.split(block)[1]


def _fit_feed_forward(
    layer: Layer, y: Array, heads: _Heads, window: int | None, wanted: Array, ridge: float
) -> nnx.State:
    """The feed-forward's last matrix, for hidden states `wanted` after the layer."""
    middle, _ = _finish(*layer, y, heads, window)
    hidden, block = _hidden(*layer, middle), nnx.merge(*layer)
    down = block.mlp.down
    bias = 0 if block.mlp.down_bias is None else block.mlp.down_bias[...]
    target = (wanted - middle) / block.config.residual_scale - bias
    fitted = _nearest(hidden.reshape(-1, hidden.shape[-1]), target, down[...], ridge)
    down.set_value(jnp.asarray(fitted, down[...].dtype))
    return nnx.split(block)[1]


def _nearest(inputs: Array, target: Array, matrix: Array, ridge: float) -> np.ndarray:
    """The matrix with inputs @ matrix = target by least squares, held near the one given."""
    x, start = np.asarray(inputs, np.float32), np.asarray(matrix, np.float32)
    error = np.asarray(target, np.float32).reshape(len(x), -1) - x @ start
    gram = (x.T @ x).astype(np.float64)
    gram += ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    return start + np.linalg.solve(gram, (x.T @ error).astype(np.float64))


def _assembled(start: Decoder, layers: Sequence[Layer], weights: _Streams) -> Decoder:
    """A decoder of fitted layers and stored stream weights."""
    stored = [
        FusionWeight(jnp.stack([weights[kind, i] for i in members]))
        for kind, _, members in chains(start.config.kv_layout)
    ]
    return rebuild(start, weights=stored, layers=layers)
