"""The learned weights of the stream algebra: how they are stored, where they start, what they are.

Layers whose streams have the same sources, granularity and parameterization form a chain; a chain's
parameters are one array, whose first axis runs over its layers upwards. FusedKV's recursion over
depth (arXiv 2512.03870) runs along that axis.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind, KVLayout, Stream
from fusedkv_jax.model.parameters import FusionWeight, Initializer

Weights = dict[tuple[Kind, int], Float[Array, "J K H"]]


@functools.lru_cache(maxsize=256)
def chains(layout: KVLayout) -> tuple[tuple[Kind, Stream, tuple[int, ...]], ...]:
    """(kind, stream, layers) of every chain of layers with weighted streams."""
    found: dict[tuple[Kind, Stream], list[int]] = {}
    for kind in KINDS:
        for i, layer in enumerate(layout.layers):
            if layer.stream(kind).weights is not None:
                found.setdefault((kind, layer.stream(kind)), []).append(i)
    return tuple((kind, stream, tuple(layers)) for (kind, stream), layers in found.items())


class FusionWeights(nnx.Module):
    """All learned stream weights of a decoder, one `FusionWeight` array per chain."""

    def __init__(self, init: Initializer):
        self.config = config = init.config
        self.weights = nnx.List(
            [
                _parameter(init, stream, _shape(config, kind, stream, len(layers)))
                for kind, stream, layers in chains(config.kv_layout)
            ]
        )

    def __call__(self) -> Weights:
        """Weights of each weighted stream per term (own last), KV head and channel, float32."""
        result: Weights = {}
        for (kind, stream, layers), parameter in zip(
            chains(self.config.kv_layout), self.weights, strict=True
        ):
            direct = direct_weights(stream, parameter[...])
            full = _expand(self.config, kind, stream, direct)
            result.update({(kind, i): full[c] for c, i in enumerate(layers)})
        return result


def _shape(config: ModelConfig, kind: Kind, stream: Stream, layers: int) -> tuple[int, ...]:
    heads, channels = config.stream_shapes[kind]
    # A weight on rotated keys must be equal within each rotary pair, or scores would depend on
    # absolute positions: keys store one weight per pair.
    channels = channels // 2 if kind == "key" else channels
    size = {
        "scalar": (),
        "head": (heads,),
        "channel": (heads, channels),
        "shared_channel": (channels,),
    }[str(stream.weights)]
    terms = 1 if stream.mixing.parameterization == "convex" else stream.terms
    return (layers, terms, *size)


def _parameter(init: Initializer, stream: Stream, shape: tuple[int, ...]) -> FusionWeight:
    """The parameters [C, J, ...] of one chain."""
    mixing, terms = stream.mixing, stream.terms
    if mixing.init in ("normal", "fan_in", "recursive"):
        std = terms**-0.5 if mixing.init == "fan_in" else 1.0
        start = functools.partial(recursion, anchor=mixing.anchor)
        finish = start if mixing.init == "recursive" else None
        return init.normal(FusionWeight, shape, std, "float32", finish)
    if mixing.init == "own":
        return FusionWeight(jnp.zeros(shape, jnp.float32).at[:, -1].set(1 / mixing.scale))
    return FusionWeight(jnp.full(shape, 1.0 if mixing.init == "ones" else 1 / terms, jnp.float32))


@functools.partial(jax.jit, static_argnames="anchor")
def recursion(draws: Float[Array, "C J *size"], anchor: int) -> Float[Array, "C J *size"]:
    """FusedKV's recursion over depth: each layer rescales the last layer's fusion, and the anchor
    source adds a fresh term.

    For keys (sources 0 and mid, the anchor): a0_i = p_i a0_{i-1} and am_i = p_i am_{i-1} + r_i with
    (p_i, r_i) = draws[i], and (a0, am) = draws[0] at the first layer. For values the anchor is
    source 0. With more sources each but the anchor has its own factor, and the anchor takes that
    of the first of them.

    Args:
        draws: factors and fresh terms, [layers, sources, ...].
        anchor: position of the source that gets the fresh term.

    Returns:
        Direct weights of the same shape.
    """
    anchor = anchor % draws.shape[1]
    others = [j for j in range(draws.shape[1]) if j != anchor]
    if not others:
        return draws

    def step(weights: Array, draw: Array) -> tuple[Array, Array]:
        fresh = draw[anchor]
        factors = draw.at[anchor].set(draw[others[0]])
        weights = (factors * weights).at[anchor].add(fresh)
        return weights, weights

    _, later = jax.lax.scan(step, draws[0], draws[1:])
    return jnp.concatenate([draws[:1], later])


def direct_weights(stream: Stream, parameter: Float[Array, "C J *size"]) -> Array:
    """The weights that parameters stand for, [C, J, ...]: sources in order, own projection last."""
    if stream.mixing.parameterization == "iterative":
        parameter = recursion(parameter, stream.mixing.anchor)
    elif stream.mixing.parameterization == "convex":
        parameter = jnp.concatenate([1 - parameter, parameter], axis=1)
    return stream.mixing.scale * parameter


def _expand(
    config: ModelConfig, kind: Kind, stream: Stream, weights: Array
) -> Float[Array, "C J K H"]:
    heads, channels = config.stream_shapes[kind]
    if stream.weights in ("channel", "shared_channel") and kind == "key":
        weights = jnp.concatenate([weights, weights], axis=-1)
    if stream.weights == "shared_channel":
        weights = weights[:, :, None, :]
    while weights.ndim < 4:
        weights = weights[..., None]
    return jnp.broadcast_to(weights, (*weights.shape[:2], heads, channels))


def mix(
    weights: Float[Array, "J K H"], terms: list[Float[Array, "B T K H"]]
) -> Float[Array, "B T K H"]:
    """Weighted sum of streams in float32, rounded once to the streams' type."""
    total = sum(w * term.astype(jnp.float32) for w, term in zip(weights, terms, strict=True))
    return jnp.asarray(total).astype(terms[0].dtype)
