"""New projections for keys and values that several layers read: what serves all of them best.

A projection that only its own layer read says little about what the layers above it computed. Of
all linear maps of the layer's input into as many channels, the best for all readers together is a
reduced-rank regression onto what they had: for values into the channels of a head, for keys, of
which a reader may only turn and scale each rotary pair, into one complex number per pair.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from flax import nnx
from jaxtyping import Array
from scipy.optimize import linear_sum_assignment

from fusedkv_jax.interop.uptrain.layers import (
    Heads,
    attention_input,
    finish,
    pair_order,
    project,
    rotation_of,
)
from fusedkv_jax.interop.uptrain.least_squares import moments, regularized
from fusedkv_jax.interop.uptrain.reading import fit_keys, fit_values, output_metric, root_of
from fusedkv_jax.layouts import KINDS, Kind, KVLayout
from fusedkv_jax.model import Decoder
from fusedkv_jax.model.attention import Attention
from fusedkv_jax.model.transform import Layer, layers_of

_RIDGE = 1e-3
_ROUNDS = 2  # of matching heads, then projecting anew

StreamName = tuple[Kind, int]  # of a layer
Projections = dict[StreamName, np.ndarray]  # [D, K, H]


def readers_of(layout: KVLayout) -> dict[StreamName, list[int]]:
    """By stream, the layers for which it is the highest that they read instead of their own."""
    found: dict[StreamName, list[int]] = {}
    for i, layer in enumerate(layout.layers):
        for kind in KINDS:
            stream = layer.stream(kind)
            if not stream.own:
                found.setdefault((kind, max(stream.sources)), []).append(i)
    return found


def new_projections(model: Decoder, layout: KVLayout, parts: Iterable[Array]) -> Projections:
    """Projections of the streams that others read under a layout.

    Keys keep theirs where a norm or a bias stands between it and the rotation.

    Args:
        model: the original.
        layout: the new one.
        parts: tokens [B, T].
    """
    bent = model.config.qk_norm or model.config.block.qkv_bias
    kinds = ("value",) if bent else KINDS
    readers = {name: of for name, of in readers_of(layout).items() if name[0] in kinds}
    inputs = _Inputs({(j, i) for (_, j), of in readers.items() for i in (j, *of)})
    for tokens in parts if readers else ():
        inputs.add(model, tokens)
    layers, order = layers_of(model), pair_order(model.config)
    views = {i: _View.of(layers[i], inputs.cross[i, i], order) for _, i in inputs.pairs}
    found: Projections = {(kind, j): views[j].matrix(kind) for kind, j in readers}
    for _ in range(_ROUNDS):
        orders = _orders(readers, found, views, inputs)
        found = {
            (kind, j): (_keys if kind == "key" else _values)(
                [(views[i], orders[i], inputs.cross[j, i], inputs.scales[i]) for i in (j, *of)],
                found[kind, j],
            )
            for (kind, j), of in readers.items()
        }
    back = np.argsort(order)
    return {
        name: matrix[..., back] if name[0] == "key" else matrix for name, matrix in found.items()
    }


@dataclass
class _Inputs:
    """Sums over tokens of products of what the matrices of two layers read.

    Attributes:
        pairs: a layer that is read, and one that reads it; each with itself too.
        cross: [D, D] of each pair.
        scales: how much an error of each layer's output matters: the mean over tokens of the
            reciprocal square of the hidden states there, which norms divide by.
    """

    pairs: set[tuple[int, int]]
    cross: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    scales: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pairs |= {(i, i) for pair in self.pairs for i in pair}

    def add(self, model: Decoder, tokens: Array) -> None:
        x, seen = model.embed(tokens), {}
        last = max(max(pair) for pair in self.pairs)
        for i, layer in enumerate(layers_of(model)[: last + 1]):
            if (i, i) in self.pairs:
                seen[i] = attention_input(layer, x)
            for pair in self.pairs:
                if max(pair) == i:
                    product = moments(*(seen[j] for j in pair)).cross
                    self.cross[pair] = self.cross.get(pair, 0) + product
            q, own = project(layer, x, rotation_of(model, i, tokens.shape))
            window = model.config.kv_layout.layers[i].window
            x = finish(layer, x, Heads(q, own["key"], own["value"]), window)[1]
            scale = float((1 / (x.astype("float32") ** 2).mean(-1)).sum())
            self.scales[i] = self.scales.get(i, 0.0) + scale


@dataclass(frozen=True)
class _View:
    """What a layer made of its input, and what an error there costs.

    Attributes:
        keys, values: matrices [D, K, H], keys in the order of `pair_order`.
        queries: [K, h], squares of the queries that meet its keys, summed over tokens.
        metric: [K, H, H], squares of what its values become in the output.
        gram: [D, D], of its input.
    """

    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    metric: np.ndarray
    gram: np.ndarray

    @classmethod
    def of(cls, layer: Layer, gram: np.ndarray, order: np.ndarray) -> _View:
        attention = nnx.merge(*layer).attention
        assert isinstance(attention, Attention)
        assert attention.k_proj is not None and attention.v_proj is not None
        names = ("q_proj", "k_proj", "v_proj")
        q, k, v = (np.asarray(getattr(attention, name)[...], np.float64) for name in names)
        q, k, heads = q[..., order], k[..., order], k.shape[1]
        squares = np.einsum("dnc,dnc->nc", q, np.tensordot(gram, q, 1))
        first, second = np.split(squares, 2, axis=-1)  # of each rotary pair
        squares = (first + second).reshape(heads, -1, q.shape[-1] // 2)
        return cls(k, v, squares.sum(1), output_metric(attention, heads), gram)

    def matrix(self, kind: Kind) -> np.ndarray:
        return self.keys if kind == "key" else self.values


_Member = tuple[_View, np.ndarray, np.ndarray, float]  # head order, cross-products, scale


def _paired(matrix: np.ndarray) -> np.ndarray:
    """Rotary pairs as complex numbers."""
    a, b = np.split(matrix, 2, axis=-1)
    return a + 1j * b


def _orders(
    readers: dict[StreamName, list[int]],
    found: Projections,
    views: dict[int, _View],
    inputs: _Inputs,
) -> dict[int, np.ndarray]:
    """Which head of each layer goes with each head of what it reads; its own with themselves."""
    gains: dict[int, np.ndarray] = {}
    for (kind, j), of in readers.items():
        for i in of:
            gain = _shares(kind, found[kind, j], views[j], views[i], inputs.cross[j, i])
            gains[i] = gains.get(i, 0) + gain
    orders = {i: np.arange(view.keys.shape[1]) for i, view in views.items()}
    assigned = {i: linear_sum_assignment(gain, maximize=True)[1] for i, gain in gains.items()}
    return orders | {i: np.argsort(heads) for i, heads in assigned.items()}


def _shares(
    kind: Kind, projection: np.ndarray, source: _View, reader: _View, cross: np.ndarray
) -> np.ndarray:
    """[K, K]: how much of each head of a reader each head of a stream explains."""
    heads, wanted = projection.shape[1], reader.matrix(kind)
    shares = np.zeros((heads, heads))
    if kind == "key":
        projection, wanted = _paired(projection), _paired(wanted)
    for h in range(heads):
        p = projection[:, h]
        for g in range(heads):
            w, seen = wanted[:, g], source.gram @ p
            if kind == "key":
                gram = np.sum(p.conj() * seen, 0).real[None, None]
                product = np.sum(p.conj() * (cross @ w), 0)[None]
                power = np.sum(w.conj() * (reader.gram @ w), 0).real
                fit = fit_keys(gram, product, power, reader.queries[g], False, True)
            else:
                products = (p.T @ seen)[None, None], (p.T @ cross @ w)[None]
                power = w.T @ reader.gram @ w
                fit = fit_values(*products, power, reader.metric[g], False)
            shares[g, h] = fit.share
    return shares


def _keys(members: list[_Member], old: np.ndarray) -> np.ndarray:
    """The projection into one complex number per head and pair, from which all keys follow."""
    gram, new = members[0][0].gram, []
    for h in range(old.shape[1]):
        wanted = [
            cross @ _paired(view.keys[:, order[h]]) * np.sqrt(view.queries[order[h]])
            for view, order, cross, _ in members
        ]
        products = np.stack(wanted)  # [members, D, h]
        best = regularized(gram, np.moveaxis(products, 0, 1).reshape(len(gram), -1), _RIDGE)
        best = best.reshape(len(gram), len(members), -1)
        power = np.einsum("mdp,dnp->pmn", products.conj(), best)
        top = np.linalg.eigh(power)[1][..., -1]  # [h, members]
        w = np.einsum("dmp,pm->dp", best, top)
        before = _paired(old[:, h])
        size = [np.sum(m.conj() * (gram @ m), 0).real for m in (before, w)]
        w = w * np.sqrt(size[0] / np.maximum(size[1], 1e-30))
        new.append(np.concatenate([w.real, w.imag], -1))
    return np.stack(new, 1)


def _values(members: list[_Member], old: np.ndarray) -> np.ndarray:
    """The projection into the channels of each head, from which all values follow best."""
    gram, new = members[0][0].gram, []
    for h in range(old.shape[1]):
        wanted = [
            cross @ view.values[:, order[h]] @ root_of(view.metric[order[h]]) * np.sqrt(scale)
            for view, order, cross, scale in members
        ]
        products = np.concatenate(wanted, 1)  # [D, members * H]
        best = regularized(gram, products, _RIDGE)
        channels = old.shape[2]
        top = np.linalg.eigh(products.T @ best)[1][:, : -channels - 1 : -1]
        w = best @ top
        size = [np.sum(m * (gram @ m)) for m in (old[:, h], w)]
        new.append(w * np.sqrt(size[0] / size[1]))
    return np.stack(new, 1)
