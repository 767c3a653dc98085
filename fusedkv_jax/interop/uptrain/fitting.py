"""`fit`: a decoder under another layout, fitted layer after layer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.interop.huggingface import load_huggingface
from fusedkv_jax.interop.huggingface_config import with_layout
from fusedkv_jax.interop.huggingface_names import places, to_theirs
from fusedkv_jax.interop.uptrain import layers as pieces
from fusedkv_jax.interop.uptrain.from_above import look_ahead, read_from_above
from fusedkv_jax.interop.uptrain.layers import Heads
from fusedkv_jax.interop.uptrain.least_squares import Moments, moments, nearest
from fusedkv_jax.interop.uptrain.reading import KeySums, ValueSums, read_others, stream_sums
from fusedkv_jax.interop.uptrain.sources import new_projections
from fusedkv_jax.layouts import KINDS, Kind, KVLayout, LayerKV
from fusedkv_jax.model import Decoder
from fusedkv_jax.model.attention import Attention
from fusedkv_jax.model.checks import check_integers, check_tokens
from fusedkv_jax.model.mixing import chains
from fusedkv_jax.model.parameters import FusionWeight
from fusedkv_jax.model.rotary import Rotation
from fusedkv_jax.model.transform import Layer, layers_of, rebuild

_TOKENS = 2048  # that are computed at a time
_CYCLIC_ROUNDS = 2  # a third one changes losses by a thousandth
_HELD_OUT = 8  # one part in so many chooses how firmly a matrix stays where it was


def fit(
    model: Decoder,
    layout: KVLayout | str,
    tokens: Int[Array, "B T"],
    *,
    ridge: float | None = None,
) -> Decoder:
    """The model under another layout, as near to it as least squares bring it.

    Memory holds, beside both models, about eight arrays [B, T, D] and the streams that are read.

    Args:
        model: a decoder whose layers all have their own keys and values, with norms before its
            branches.
        layout: any whose layers either cache both streams or neither, with weights per channel or
            none.
        tokens: int32 text to fit on, whole sequences; the more the better, 16,000 tokens are some.
        ridge: how firmly matrices stay what they were, relative to their inputs' mean square; by
            default the last eighth of 16,000 tokens or more chooses for each matrix, and with
            fewer it is 0.01.

    Raises:
        ValueError: a model or a layout that is not of this kind, or tokens that are none.
    """
    config = fitted_config(model.config, layout)
    check_integers("tokens", tokens, "B T")
    check_tokens(tokens, config.vocab_size)
    if not tokens.size:
        raise ValueError(f"tokens has shape {tokens.shape}; give text to fit on")
    start = drop(model, config.kv_layout)
    parts = _parts(tokens)
    sources = new_projections(model, config.kv_layout, parts)
    x = [model.embed(part) for part in parts]
    above = look_ahead(model, config.kv_layout, sources, x)
    for _ in range(_CYCLIC_ROUNDS if config.kv_layout.is_cyclic else 1):
        fitting = _Fitting(model, config, layers_of(start), sources, ridge, x, x, above)
        for i in range(config.num_layers):
            fitting.fit_layer(i)
        above = fitting.above
    return _assembled(start, fitting.layers, fitting.weights)


def fitted_config(old: ModelConfig, layout: KVLayout | str) -> ModelConfig:
    """The configuration of what `fit` makes of a model; raises as it does."""
    new, block = with_layout(old, layout), old.block
    if old.mla is not None or block.norm_placement != "pre" or block.parallel:
        raise ValueError("only models with separate keys and values and norms before are fitted")
    streams = [layer.stream(kind) for layer in old.kv_layout.layers for kind in KINDS]
    if any(not stream.own or stream.sources for stream in streams):
        raise ValueError("layers of the model share keys or values already; fit an original")
    for i, layer in enumerate(new.kv_layout.layers):
        for part in (layer.key, layer.value):
            if layer.key.own != layer.value.own or part.own and part.sources or layer.kv_norm:
                raise ValueError(f"layer {i}: only layers that cache both streams or none")
            if part.weights not in (None, "channel") or part.mixing.parameterization != "direct":
                raise ValueError(f"layer {i}: weights are fitted per channel, and stored directly")
    return new


def _parts(tokens: Array) -> list[Array]:
    """The rows in equal parts, so that one program computes all."""
    rows, length = tokens.shape
    most = max(1, _TOKENS // length)
    size = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= most)
    return [tokens[i : i + size] for i in range(0, rows, size)]


def drop(model: Decoder, layout: KVLayout | str) -> Decoder:
    """The model under another layout, without the projections that the layout has no place for.

    Learned stream weights start as in a new model. As a start for training it has lost what the
    model knew; `fit` gives one that has not.
    """
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = variable[...]
        for index, name, entry in places(model.config, path):
            tensors[name] = to_theirs(entry, np.asarray(value if index is None else value[index]))
    return load_huggingface(tensors, layout, config=model.config, rope_interleave=False)


def _assembled(
    start: Decoder, layers: Sequence[Layer], weights: dict[pieces.StreamName, Array]
) -> Decoder:
    """A decoder of fitted layers and stored stream weights."""
    stored = [
        FusionWeight(jnp.stack([weights[kind, i] for i in members]))
        for kind, _, members in chains(start.config.kv_layout)
    ]
    return rebuild(start, weights=stored, layers=layers)


@dataclass
class _Fitting:
    """A walk upwards through the original and what is fitted to it.

    Attributes:
        model: the original.
        config: of the new model.
        layers: of the new model, fitted as far as the walk has come.
        sources: new projections of streams that others read.
        ridge: as for `fit`.
        x: hidden states of the original that enter the next layer, a part of the rows each.
        y: those of the new model; the same list as long as nothing differs.
        above: streams of layers above their readers, of each part: those of the round before, and
            after the walk those of this one.
        streams: of the new model, those that are read further on, of each part.
        weights: found for its streams.
    """

    model: Decoder
    config: ModelConfig
    layers: list[Layer]
    sources: dict[pieces.StreamName, np.ndarray]
    ridge: float | None
    x: list[Array]
    y: list[Array]
    above: list[dict[pieces.StreamName, Array]]
    streams: list[dict[pieces.StreamName, Array]] = field(default_factory=list)
    weights: dict[pieces.StreamName, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.streams, self.above = [dict(part) for part in self.above], [{} for _ in self.x]
        self.originals = layers_of(self.model)
        self.expected = np.eye(self.config.d_model)  # map to the original's inputs, of this layer

    def fit_layer(self, i: int) -> None:
        """Fit one layer, and pass through it in both models."""
        kv = self.config.kv_layout.layers[i]
        rotation = pieces.rotation_of(self.model, i, self.x[0].shape[:2])
        anew: dict[Kind, np.ndarray] = {
            kind: self.sources[kind, i] for kind in KINDS if (kind, i) in self.sources
        }
        strict = any(j > i for j in kv.key.sources + kv.value.sources)
        same = kv.caches and not anew and kv.window == self._window(i)
        if self.y is self.x and same:
            self.x = self.y = self._through(i, kv, rotation)
            return
        original = self.originals[i]
        if self.y is not self.x:
            self._expect_original(i)
        if anew:
            self._project_anew(i, anew)
        after, x = self._original(i, kv, rotation, reads=not kv.caches or bool(anew))
        contexts = [
            pieces.context(self.layers[i], self._heads(i, kv, part, y, rotation), kv.window, strict)
            for part, y in enumerate(self.y)
        ]
        middle = self._fit_output(i, contexts, after, x)
        self.y = self._fit_feed_forward(i, original, middle, after, x)
        self.x = x
        self._forget(i)

    def _window(self, i: int) -> int | None:
        """The original's."""
        return self.model.config.kv_layout.layers[i].window

    def _through(self, i: int, kv: LayerKV, rotation: Rotation) -> list[Array]:
        """Past a layer that stays as it was."""
        found = []
        for part, x in enumerate(self.x):
            q, own = pieces.project(self.layers[i], x, rotation)
            self._keep(i, part, own)
            heads = Heads(q, own["key"], own["value"])
            found.append(pieces.finish(self.layers[i], x, heads, kv.window)[1])
        return found

    def _original(
        self, i: int, kv: LayerKV, rotation: Rotation, reads: bool
    ) -> tuple[list[Array], list[Array]]:
        """The original's hidden states after attention and after the layer.

        Streams that the new layer owns are kept; one that reads others learns how to.
        """
        after, x_next, sums = [], [], []
        order = pieces.pair_order(self.config)
        for part, (x, y) in enumerate(zip(self.x, self.y, strict=True)):
            q, own = pieces.project(self.originals[i], x, rotation)
            wanted = Heads(q, own["key"], own["value"])
            middle, x = pieces.finish(self.originals[i], x, wanted, self._window(i))
            after.append(middle)
            x_next.append(x)
            own = pieces.project(self.layers[i], y, rotation)[1]
            self._keep(i, part, own, always=True)
            if reads:
                streams = self.streams[part]
                keys, values = (
                    tuple(streams[kind, j] for j in kv.stream(kind).sources or (i,))
                    for kind in KINDS
                )
                ordered = wanted._replace(q=q[..., order], keys=wanted.keys[..., order])
                found = stream_sums(ordered, tuple(key[..., order] for key in keys), values)
                sums.append([[np.asarray(array) for array in kind] for kind in found])
        if reads:
            keys, values = (
                [functools.reduce(np.add, arrays) for arrays in zip(*kind, strict=True)]
                for kind in zip(*sums, strict=True)
            )
            params, weights = read_others(
                self.layers[i],
                kv,
                KeySums(*keys),
                ValueSums(*(array.astype(np.float64) for array in values)),
                pairs=None if self.config.qk_norm else order,
            )
            self.layers[i] = self.layers[i][0], params
            self.weights |= {(kind, i): array for kind, array in weights.items()}
        return after, x_next

    def _heads(self, i: int, kv: LayerKV, part: int, y: Array, rotation: Rotation) -> Heads:
        q = pieces.project(self.layers[i], y, rotation)[0]
        return Heads(q, *pieces.rebuilt(i, kv, self.streams[part], self.weights))

    def _expect_original(self, i: int) -> None:
        """Queries, keys and values as they would be of the original's hidden states."""
        original, layer = self.originals[i], self.layers[i]
        sums = [
            moments(pieces.attention_input(layer, y), pieces.attention_input(original, x))
            for x, y in zip(self.x, self.y, strict=True)
        ]
        block = nnx.merge(*layer)
        matrix = self._nearest(sums, np.eye(self.config.d_model))
        _precede(block.attention, ("q_proj", "k_proj", "v_proj"), matrix)
        self.layers[i], self.expected = nnx.split(block), matrix

    def _project_anew(self, i: int, anew: dict[Kind, np.ndarray]) -> None:
        self.layers[i] = pieces.with_projections(self.layers[i], anew)
        if self.y is not self.x:
            block = nnx.merge(*self.layers[i])
            _precede(block.attention, [f"{kind[0]}_proj" for kind in anew], self.expected)
            self.layers[i] = nnx.split(block)

    def _fit_output(
        self, i: int, contexts: list[Array], after: list[Array], x_next: list[Array]
    ) -> list[Array]:
        """Attention's output projection; gives the hidden states after it."""
        block = nnx.merge(*self.layers[i])
        attention = block.attention
        assert isinstance(attention, Attention)
        out, bias, scale = attention.o_proj, attention.o_bias, block.config.residual_scale
        width = self.config.d_model
        matrix = np.asarray(out[...], np.float64).reshape(-1, width)
        inputs = [context.reshape(-1, len(matrix)) for context in contexts]
        matrix = self._bring_back(inputs, self.y, after, x_next, matrix, bias, scale)
        out.set_value(jnp.asarray(matrix.reshape(out[...].shape), out[...].dtype))
        self.layers[i] = nnx.split(block)
        return [
            _added(y, context, out[...].reshape(-1, width), bias, scale)
            for y, context in zip(self.y, inputs, strict=True)
        ]

    def _fit_feed_forward(
        self,
        i: int,
        original: Layer,
        middle: list[Array],
        after: list[Array],
        x_next: list[Array],
    ) -> list[Array]:
        """The feed-forward's matrices; gives the hidden states after the layer."""
        sums = [
            moments(pieces.feed_forward_input(original, y), pieces.feed_forward_input(original, x))
            for x, y in zip(after, middle, strict=True)
        ]
        block = nnx.merge(*self.layers[i])
        expected = self._nearest(sums, np.eye(self.config.d_model))
        _precede(block.mlp, ("gate", "up"), expected)
        layer = nnx.split(block)
        inputs = [pieces.hidden(layer, y) for y in middle]
        down, bias, scale = block.mlp.down, block.mlp.down_bias, block.config.residual_scale
        matrix = self._bring_back(
            inputs, middle, x_next, x_next, np.asarray(down[...]), bias, scale
        )
        down.set_value(jnp.asarray(matrix, down[...].dtype))
        self.layers[i] = nnx.split(block)
        return [
            _added(y, one, down[...], bias, scale) for y, one in zip(middle, inputs, strict=True)
        ]

    def _bring_back(
        self,
        inputs: list[Array],
        before: list[Array],
        wanted: list[Array],
        x_next: list[Array],
        start: np.ndarray,
        bias: nnx.Param | None,
        scale: float,
    ) -> np.ndarray:
        """The matrix that takes hidden states nearest to those of the original."""
        sums = []
        for one, y, x, top in zip(inputs, before, wanted, x_next, strict=True):
            # An error counts relative to the hidden states that it is added to, as norms will
            # divide by these: a few tokens have a thousand times the square of the others.
            size = jnp.sqrt((top.astype(jnp.float32) ** 2).mean(-1, keepdims=True))
            target = (x - y) / scale - (0 if bias is None else bias[...])
            sums.append(moments(one.reshape(*target.shape[:2], -1) / size, target / size))
        return self._nearest(sums, start)

    def _nearest(self, sums: list[Moments], start: np.ndarray) -> np.ndarray:
        return nearest(sums, len(sums) // _HELD_OUT, start, self.ridge)

    def _keep(self, i: int, part: int, own: dict[Kind, Array], always: bool = False) -> None:
        """Keep the streams that are read: by layers above, or in this one."""
        readers = self.config.kv_layout.layers[i + 1 :]
        for kind, array in own.items():
            if always or any(i in layer.stream(kind).sources for layer in readers):
                self.streams[part][kind, i] = array
            if (kind, i) in read_from_above(self.config.kv_layout):
                self.above[part][kind, i] = array

    def _forget(self, i: int) -> None:
        """Drop what no layer above reads."""
        above = self.config.kv_layout.layers[i + 1 :]
        read = {(kind, j) for kind in KINDS for layer in above for j in layer.stream(kind).sources}
        self.streams = [
            {name: array for name, array in part.items() if name in read} for part in self.streams
        ]


def _precede(module: nnx.Module, names: Sequence[str], matrix: np.ndarray) -> None:
    """Make a map of the inputs part of the matrices that read them."""
    for name in names:
        parameter = getattr(module, name, None)
        if parameter is not None:
            product = np.tensordot(matrix, np.asarray(parameter[...], np.float64), 1)
            parameter.set_value(jnp.asarray(product, parameter[...].dtype))


def _added(y: Array, inputs: Array, matrix: Array, bias: nnx.Param | None, scale: float) -> Array:
    out = (inputs.reshape(-1, matrix.shape[0]) @ matrix).reshape(y.shape)
    return y + (out if bias is None else out + bias[...]) * scale
