"""How a layer best reads streams that are not those it knew: weights, queries and output."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from scipy.optimize import linear_sum_assignment

from fusedkv_jax.interop.uptrain.layers import Heads
from fusedkv_jax.layouts import KINDS, Kind, LayerKV
from fusedkv_jax.model.attention import Attention
from fusedkv_jax.model.transform import Layer

_ANGLES = 64  # a phase is sought among so many
_ROUNDS = 8  # of fitting a map, then the channel weights before it
_TINY = 1e-30  # where a layer does nothing


class KeySums(NamedTuple):
    """Sums over tokens of products of keys, whose rotary pairs are complex numbers.

    Attributes:
        gram: [J, J, K, h], real, of the J streams that are read, of one KV head each.
        cross: [J, K', K, h], of these with the keys that were, of all their heads K'.
        power: [K', h], of the keys that were.
        queries: [K', h], of the queries that read these.
    """

    gram: np.ndarray
    cross: np.ndarray
    power: np.ndarray
    queries: np.ndarray


class ValueSums(NamedTuple):
    """The same of values: [J, J, K, H, H], [J, K', K, H, H] and [K', H, H]."""

    gram: np.ndarray
    cross: np.ndarray
    power: np.ndarray


class KeyFit(NamedTuple):
    """Weights [J, h] or None, complex factors [h], and the share of the square explained."""

    weights: np.ndarray | None
    factors: np.ndarray
    share: float


class ValueFit(NamedTuple):
    """Weights [J, H] or None, the map [H, H] after them, and the share of the square explained."""

    weights: np.ndarray | None
    matrix: np.ndarray
    share: float


@jax.jit
def stream_sums(
    wanted: Heads, keys: tuple[Array, ...], values: tuple[Array, ...]
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The fields of `KeySums` and of `ValueSums`, over some tokens."""
    float32 = lambda array: array.astype(jnp.float32)  # noqa: E731

    def pairs(array: Array) -> Array:
        a, b = jnp.split(float32(array), 2, axis=-1)
        return a + 1j * b

    z, terms = pairs(wanted.keys), jnp.stack([pairs(array) for array in keys])
    q = pairs(wanted.q)
    q = q.reshape(*q.shape[:2], z.shape[2], -1, q.shape[-1])
    key = (
        jnp.einsum("jbtkp,lbtkp->jlkp", terms.conj(), terms).real,
        jnp.einsum("jbtkp,btgp->jgkp", terms.conj(), z),
        jnp.sum(jnp.abs(z) ** 2, (0, 1)),
        jnp.sum(jnp.abs(q) ** 2, (0, 1, 3)),
    )
    v, read = float32(wanted.values), jnp.stack([float32(array) for array in values])
    value = (
        jnp.einsum("jbtkc,lbtkd->jlkcd", read, read),
        jnp.einsum("jbtkc,btgd->jgkcd", read, v),
        jnp.einsum("btgc,btgd->gcd", v, v),
    )
    return key, value


def read_others(
    layer: Layer, kv: LayerKV, keys: KeySums, values: ValueSums, pairs: np.ndarray | None
) -> tuple[nnx.State, dict[Kind, Array]]:
    """A layer whose queries and output expect other streams, and weights [J, K, ...] of these.

    Args:
        layer: it, with the queries and the output that it had.
        kv: its streams; those of its own count as read.
        keys: of the streams that it reads, and of the keys that it had.
        values: likewise.
        pairs: the order of channels that `keys` has, if keys are rotated right after their
            projection, so that factors can move past the rotation; else None.
    """
    block = nnx.merge(*layer)
    attention = block.attention
    assert isinstance(attention, Attention)  # latent ones are refused
    heads = keys.power.shape[0]
    metric = output_metric(attention, heads)
    fits: dict[tuple[int, int], tuple[KeyFit, ValueFit]] = {}
    gain = np.zeros((heads, heads))
    for g in range(heads):  # of the layer
        for h in range(heads):  # of what it reads
            key = fit_keys(
                keys.gram[:, :, h],
                keys.cross[:, g, h],
                keys.power[g],
                keys.queries[g],
                kv.key.weights is not None,
                pairs is not None,
            )
            value = fit_values(
                values.gram[:, :, h],
                values.cross[:, g, h],
                values.power[g],
                metric[g],
                kv.value.weights is not None,
            )
            fits[g, h] = key, value
            gain[g, h] = key.share + value.share
    assigned = linear_sum_assignment(gain, maximize=True)[1]
    order = np.argsort(assigned)  # which head of the layer comes to each head that is read
    chosen = [fits[g, h] for h, g in enumerate(order)]
    if pairs is not None:  # before they move: a factor belongs to a head that is read
        factors = np.stack([key.factors for key, _ in chosen])[assigned]
        _turn_queries(attention, factors, pairs)
    _move_heads(attention, order, np.stack([value.matrix for _, value in chosen]))
    found: dict[Kind, Array] = {}
    for kind, fitted in zip(KINDS, zip(*chosen, strict=True), strict=True):
        weights = [one.weights for one in fitted if one.weights is not None]
        if weights:
            found[kind] = jnp.asarray(np.stack(weights, 1), jnp.float32)
    return nnx.split(block)[1], found


def fit_keys(
    gram: np.ndarray,
    cross: np.ndarray,
    power: np.ndarray,
    queries: np.ndarray,
    weighted: bool,
    rotated: bool,
) -> KeyFit:
    """One head's keys from one head of each source.

    Args:
        gram: [J, J, h], as in `KeySums`, like the next three.
        cross: [J, h].
        power: [h].
        queries: [h]; an error of a key counts by the queries that meet it.
        weighted: sources have weights; otherwise there is one source.
        rotated: factors may differ from 1.
    """
    terms, half = cross.shape
    everything = max(float(np.sum(queries * power)), _TINY)
    gram = np.moveaxis(gram, -1, 0) + 1e-6 * np.eye(terms) * gram.mean()
    if not weighted:
        factors = cross[0] / gram[:, 0, 0] if rotated else np.ones(half, complex)
        explained = 2 * np.real(factors.conj() * cross[0]) - np.abs(factors) ** 2 * gram[:, 0, 0]
        return KeyFit(None, factors, float(np.sum(queries * explained)) / everything)
    phases = np.exp(1j * np.pi * np.arange(_ANGLES) / _ANGLES) if rotated else np.ones(1)
    parts = np.real(phases[:, None, None].conj() * cross)  # [angles, J, h]
    solved = np.linalg.solve(gram[None], np.moveaxis(parts, 1, 2)[..., None])[..., 0]
    explained = np.sum(solved * np.moveaxis(parts, 1, 2), -1)  # [angles, h]
    best, pairs = explained.argmax(0), np.arange(half)
    share = float(np.sum(queries * explained[best, pairs])) / everything
    return KeyFit(solved[best, pairs].T, phases[best], share)


def fit_values(
    gram: np.ndarray, cross: np.ndarray, power: np.ndarray, metric: np.ndarray, weighted: bool
) -> ValueFit:
    """One head's values from one head of each source, before a map that the output takes.

    Args:
        gram: [J, J, H, H], as in `ValueSums`, like the next two.
        cross: [J, H, H].
        power: [H, H].
        metric: [H, H]; an error e counts as e^T metric e.
        weighted: sources have a weight per channel; otherwise there is one source.
    """
    count, channels, _ = cross.shape
    root = root_of(metric)
    seen = cross @ root
    small = 1e-4 * np.trace(gram[-1, -1]) / channels * np.eye(channels)

    def solve_map(w: np.ndarray, products: np.ndarray) -> tuple[np.ndarray, float]:
        left = np.einsum("jc,ld,jlcd->cd", w, w, gram)
        right = np.einsum("jc,jcd->cd", w, products)
        matrix = np.linalg.solve(left + small, right)
        return matrix, float(np.sum(matrix * right))

    def alternate(w: np.ndarray) -> tuple[float, np.ndarray]:
        matrix, explained = solve_map(w, seen)
        for _ in range(_ROUNDS):
            square = matrix @ matrix.T
            left = np.moveaxis(gram * square, 2, 1).reshape(count * channels, -1)
            right = np.sum(matrix * seen, axis=-1).reshape(-1)
            left = left + 1e-6 * np.trace(left) / len(left) * np.eye(len(left))
            w = np.linalg.solve(left, right).reshape(count, channels)
            matrix, explained = solve_map(w, seen)
        return explained, w

    everything = max(float(np.sum(metric * power)), _TINY)
    if not weighted:
        w = np.ones((1, channels))
        return ValueFit(None, solve_map(w, cross)[0], solve_map(w, seen)[1] / everything)
    ramp = np.linspace(0.1, 1.1, channels)
    starts = ([ramp[::-1], ramp], [ramp, ramp[::-1]])
    tried = [alternate(np.stack([start[j % 2] for j in range(count)])) for start in starts]
    explained, w = max(tried, key=lambda found: found[0])
    return ValueFit(w, solve_map(w, cross)[0], explained / everything)


def output_metric(attention: Attention, heads: int) -> np.ndarray:
    """[K, H, H]: what an error of a KV head's values does to the output, squared."""
    out = np.asarray(attention.o_proj[...], np.float64)  # [N, H, D]
    apart = out.reshape(heads, -1, *out.shape[1:])
    return np.einsum("kghd,kgid->khi", apart, apart)


def root_of(metric: np.ndarray) -> np.ndarray:
    """[H, H]: a matrix r with r r^T = metric, or next to it."""
    size = len(metric)
    return np.linalg.cholesky(metric + (1e-6 * np.trace(metric) / size + _TINY) * np.eye(size))


def _turn_queries(attention: Attention, factors: np.ndarray, pairs: np.ndarray) -> None:
    """The rotary pairs of the queries are multiplied with the conjugates of factors [K, h].

    Channels c and c + h of the order `pairs` are one.
    """
    back = np.argsort(pairs)
    for name in ("q_proj", "q_bias"):
        parameter = getattr(attention, name)
        if parameter is None:
            continue
        array = np.asarray(parameter[...])[..., pairs]
        apart = array.reshape(*array.shape[:-2], len(factors), -1, array.shape[-1])
        a, b = np.split(apart, 2, axis=-1)
        z = (a + 1j * b) * factors.conj()[:, None]
        turned = np.concatenate([z.real, z.imag], -1).reshape(array.shape)[..., back]
        parameter.set_value(jnp.asarray(turned, parameter[...].dtype))


def _move_heads(attention: Attention, order: np.ndarray, maps: np.ndarray) -> None:
    """Query heads go to other KV heads.

    Args:
        attention: is changed.
        order: which KV head comes to each that is read.
        maps: [K, H, H], from the values that are read to those that the output projection knows.
    """
    heads = len(order)

    def moved(array: Array, axis: int) -> np.ndarray:
        """The heads of one axis in two, [K, G]."""
        shape = array.shape
        apart = np.asarray(array).reshape(*shape[:axis], heads, -1, *shape[axis + 1 :])
        return np.take(apart, order, axis=axis)

    for name, axis in (("q_proj", 1), ("q_bias", 0)):
        parameter = getattr(attention, name)
        if parameter is not None:
            array = parameter[...]
            parameter.set_value(jnp.asarray(moved(array, axis).reshape(array.shape), array.dtype))
    out = attention.o_proj[...]
    mapped = np.einsum("khi,kgid->kghd", maps, moved(out, 0))
    attention.o_proj.set_value(jnp.asarray(mapped.reshape(out.shape), out.dtype))
