"""One layer of a decoder, computed in pieces."""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from fusedkv_jax.cache.calls import Piece, Rows
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind, LayerKV
from fusedkv_jax.model import Decoder
from fusedkv_jax.model.rotary import Rotation, rotated_channels
from fusedkv_jax.model.transform import Layer

StreamName = tuple[Kind, int]  # and the layer


class Heads(NamedTuple):
    """What the attention of a layer multiplies, [B, T, heads, H] each."""

    q: Array
    keys: Array
    values: Array

    def pieces(self, window: int | None, strict: bool = False) -> tuple[Piece, ...]:
        """Keys and values as a block of the model reads them; see `Rows` for the arguments."""
        positions = jnp.broadcast_to(jnp.arange(self.q.shape[1]), self.q.shape[:2])
        mask = Rows(positions, window, strict).mask()
        if not strict:
            del mask["q_positions"]  # the default, which is known while tracing
        return (Piece((self.keys,), (self.values,), mask),)


def rotation_of(model: Decoder, layer: int, shape: tuple[int, ...]) -> Rotation:
    """The rotation of a layer, for whole sequences [B, T]."""
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    rotation, kinds = model.rotation(positions), model.config.rope_kinds
    if len(kinds) == 1:
        return rotation
    kind = kinds.index(model.config.layer_ropes[layer])
    cos, sin = rotation
    return cos[kind], sin[kind]


def pair_order(config: ModelConfig) -> np.ndarray:
    """The channels of a key in an order in which rotary pairs are c and c + H/2, [H].

    Those that do not rotate come in pairs too: any factor moves past their rotation, which is none.
    """
    turning, size = rotated_channels(config.rope, config.channels), config.channels
    channels = np.split(np.arange(turning), 2), np.split(np.arange(turning, size), 2)
    return np.concatenate([part[half] for half in (0, 1) for part in channels])


def attention_input(layer: Layer, x: Array) -> Array:
    """What the matrices of queries, keys and values read."""
    return _attention_input(*layer, x)


@functools.partial(jax.jit, static_argnums=0)
def _attention_input(graph: nnx.GraphDef, params: nnx.State, x: Array) -> Array:
    return nnx.merge(graph, params).attention_norm(x)


def project(layer: Layer, x: Array, rotation: Rotation) -> tuple[Array, dict[Kind, Array]]:
    """Queries, and the streams that the layer owns."""
    return _project(*layer, x, rotation)


@functools.partial(jax.jit, static_argnums=0)
def _project(
    graph: nnx.GraphDef, params: nnx.State, x: Array, rotation: Rotation
) -> tuple[Array, dict[Kind, Array]]:
    return nnx.merge(graph, params).project(x, rotation)


def with_projections(layer: Layer, matrices: dict[Kind, np.ndarray]) -> Layer:
    """The layer with other projections [D, K, H] of keys or values."""
    block = nnx.merge(*layer)
    for kind, matrix in matrices.items():
        parameter = getattr(block.attention, f"{kind[0]}_proj")
        parameter.set_value(jnp.asarray(matrix, parameter[...].dtype))
    return nnx.split(block)


def context(layer: Layer, heads: Heads, window: int | None, strict: bool) -> Array:
    """What enters attention's output projection, [B, T, N, H]."""
    return _context(*layer, heads, window, strict)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _context(
    graph: nnx.GraphDef, params: nnx.State, heads: Heads, window: int | None, strict: bool
) -> Array:
    block, weights = nnx.merge(graph, params), {"key": None, "value": None}
    return block.attention.context(heads.q, heads.pieces(window, strict), weights)[0]


def finish(layer: Layer, x: Array, heads: Heads, window: int | None) -> tuple[Array, Array]:
    """Hidden states after attention, and after the layer."""
    return _finish(*layer, x, heads, window)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _finish(
    graph: nnx.GraphDef, params: nnx.State, x: Array, heads: Heads, window: int | None
) -> tuple[Array, Array]:
    block = nnx.merge(graph, params)
    out, _ = block.attend(heads.q, heads.pieces(window), {"key": None, "value": None})
    return x + out * block.config.residual_scale, block.finish(x, out)


def feed_forward_input(layer: Layer, middle: Array) -> Array:
    """What the feed-forward's first matrices read."""
    return _feed_forward_input(*layer, middle)


@functools.partial(jax.jit, static_argnums=0)
def _feed_forward_input(graph: nnx.GraphDef, params: nnx.State, middle: Array) -> Array:
    return nnx.merge(graph, params).mlp_norm(middle)


def hidden(layer: Layer, middle: Array) -> Array:
    """What enters the feed-forward's last matrix."""
    return _hidden(*layer, middle)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graph: nnx.GraphDef, params: nnx.State, middle: Array) -> Array:
    block = nnx.merge(graph, params)
    return block.mlp.hidden(block.mlp_norm(middle))


def rebuilt(
    layer: int, kv: LayerKV, streams: dict[StreamName, Array], weights: dict[StreamName, Array]
) -> tuple[Array, Array]:
    """Keys and values that a layer attends to.

    Args:
        layer: its number.
        kv: its streams.
        streams: those that are cached, its own among them.
        weights: per channel, [J, K, h] of keys and [J, K, H] of values.
    """
    found = []
    for kind in KINDS:
        stream = kv.stream(kind)
        if stream.own:
            found.append(streams[kind, layer])
            continue
        sources = [streams[kind, j] for j in stream.sources]
        if stream.weights is None:
            found.append(sources[0])
            continue
        w = weights[kind, layer]
        w = jnp.concatenate([w, w], axis=-1) if kind == "key" else w
        terms = (one * source for one, source in zip(w, sources, strict=True))
        found.append(functools.reduce(operator.add, terms))
    keys, values = found
    return keys, values
