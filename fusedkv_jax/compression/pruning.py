"""Pruned fusion: drops the fusion sources that matter least, so that decoding reads less cache.

FusedKV's upper layers read two cached streams each for keys and for values. By the recursion that
its weights start from, the influence of layer 0 on keys and of the middle layer on values halves
with every layer, so many of these reads are worth little. What is dropped is gone from the layout:
the model stays an ordinary one, without zero weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fusedkv_jax import costs
from fusedkv_jax.cache import KVCache
from fusedkv_jax.cache.cache import unstacked
from fusedkv_jax.compression.compressor import CompressionError
from fusedkv_jax.layouts import KINDS, Kind, KVLayout, Mixing, Stream
from fusedkv_jax.model import Decoder, fold_fusion
from fusedkv_jax.model.checks import check_integers
from fusedkv_jax.model.mixing import chains
from fusedkv_jax.model.transform import relayout
from fusedkv_jax.validation import check_kind

StreamName = tuple[Kind, int]
Kept = dict[StreamName, tuple[int, ...]]  # places, among a stream's sources, of those that stay


@dataclass(frozen=True)
class PruningStep:
    """A model on the way, and what was dropped last.

    Attributes:
        dropped: (kind, layer, source) of each read that was dropped.
        reads: bytes of cache that decoding a token reads, over those of a model that reads one
            stream of keys and one of values in every layer.
        bytes_per_token: these bytes, of a bfloat16 cache with as many tokens as a calibration row.
        divergence: KL divergence of the next-token distributions from those of the model before
            any pruning, in nats per calibration token.
    """

    dropped: tuple[tuple[Kind, int, int], ...]
    reads: float
    bytes_per_token: int
    divergence: float


@dataclass(frozen=True)
class PruningReport:
    """Quality against cache bytes read, from the whole model down to the budget.

    Attributes:
        steps: the whole model, then one more source dropped each.
    """

    steps: tuple[PruningStep, ...]

    def __str__(self) -> str:
        lines = ["reads   bytes/token  KL (nats/token)  dropped"]
        for step in self.steps:
            names = ", ".join(f"{kind} {layer} <- {source}" for kind, layer, source in step.dropped)
            lines.append(
                f"{step.reads:5.3f}x {step.bytes_per_token:12,d}  {step.divergence:15.6f}  {names}"
            )
        return "\n".join(lines)


def prune_sources(
    model: Decoder,
    budget: float,
    calibration: Int[Array, "B T"],
    *,
    refit: bool = True,
    group: int = 1,
    progress: Callable[[PruningStep], None] | None = None,
) -> tuple[Decoder, PruningReport]:
    """A model whose layers read fewer fusion sources.

    Greedy: in every step each remaining source is dropped on trial, and the one goes for good
    without which the distributions of the calibration text's next tokens change least. That takes
    about n^2 / 2 forward passes over the text for n sources to drop.

    Args:
        model: a model whose layout fuses cached streams.
        budget: `PruningStep.reads` to reach, at least 1; FusedKV begins at 1.5.
        calibration: int32 text, some hundred tokens of what the model is used for.
        refit: the weights of the sources that remain are those that come nearest, in the sense of
            least squares over the calibration text, to the stream as it was.
        group: consecutive layers that are pruned alike. Layers with the same sources are scanned,
            so larger groups keep the program small.
        progress: called with each step when it is done.

    Returns:
        The model, with its other parameters shared, and the report.

    Raises:
        CompressionError: a budget below 1, a group below 1, or a layout that fuses nothing.
    """
    check_kind("model", model, Decoder, "a Decoder", CompressionError)
    check_integers("calibration", calibration, "B T")
    for name, value in (("budget", budget), ("group", group)):
        if not value >= 1:
            raise CompressionError(f"{name}={value}; use at least 1")
    pruning = _Pruning(fold_fusion(model), calibration, refit)
    units = pruning.units(group)
    if not units:
        raise CompressionError(
            "prune_sources needs layers that fuse several cached streams, and the layout has none;"
            " use it on fusedkv"
        )
    kept: Kept = {name: tuple(range(len(s.sources))) for name, s in pruning.streams.items()}
    steps = [PruningStep((), *pruning.reads(kept), 0.0)]
    while steps[-1].reads > budget * (1 + 1e-6):
        trials = []
        for unit in units:
            for place in kept[unit[0]]:
                less = tuple(p for p in kept[unit[0]] if p != place)
                if less:
                    trial = kept | dict.fromkeys(unit, less)
                    trials.append((pruning.divergence(trial), unit, place, trial))
        divergence, unit, place, kept = min(trials, key=lambda trial: trial[0])
        dropped = tuple((kind, i, pruning.streams[kind, i].sources[place]) for kind, i in unit)
        steps.append(PruningStep(dropped, *pruning.reads(kept), divergence))
        if progress is not None:
            progress(steps[-1])
    return pruning.build(kept), PruningReport(tuple(steps))


class _Pruning:
    """A model with direct weights, and what dropping sources does to it."""

    def __init__(
        self,
        model: Decoder,
        calibration: Int[Array, "B T"],
        refit: bool,
    ):
        self.model, self.config = model, model.config
        self.layout = model.config.kv_layout
        self.length = calibration.shape[1]
        self.streams = dict(_fused(self.layout))
        self.weights: dict[StreamName, np.ndarray] = {
            (kind, i): np.asarray(parameter[...][c], np.float64)
            for (kind, _, layers), parameter in zip(
                chains(self.layout), model.mixing.weights, strict=True
            )
            for c, i in enumerate(layers)
        }
        self.grams = _grams(model, calibration, self.streams) if refit and self.streams else None
        split = nnx.split(model)
        tokens = jnp.asarray(calibration)
        reference = jax.jit(lambda params, tokens: _log_probs(split[0], params, tokens))
        target = reference(split[1], tokens)

        @jax.jit
        def divergence(
            params: nnx.State, arrays: list[Array], tokens: Array, target: Array
        ) -> Array:
            found = _log_probs(split[0], params, tokens, arrays)
            return jnp.mean(jnp.sum(jnp.exp(target) * (target - found), axis=-1))

        self._divergence = lambda arrays: float(divergence(split[1], arrays, tokens, target))

    def units(self, group: int) -> list[tuple[StreamName, ...]]:
        """Streams that lose sources together."""
        together: list[tuple[Kind, ...]] = (
            [KINDS] if self.config.mla is not None else [(kind,) for kind in KINDS]
        )
        units = []
        for kinds in together:
            layers = [i for kind, i in self.streams if kind == kinds[0]]
            while layers:
                alike = [layers[0]]
                for i in layers[1:group]:
                    same = self.streams[kinds[0], i] == self.streams[kinds[0], layers[0]]
                    if i != alike[-1] + 1 or not same:
                        break
                    alike.append(i)
                layers = layers[len(alike) :]
                units.append(tuple((kind, i) for i in alike for kind in kinds))
        return units

    def reads(self, kept: Kept) -> tuple[float, int]:
        """Reads as a ratio, and in bytes."""

        def total(kept: Kept) -> int:
            config = dataclasses.replace(self.config, layout=self._layout(kept))
            return costs.decode_cache_reads(config, self.length, "bfloat16")

        found = total(kept)
        return found / total({name: places[:1] for name, places in kept.items()}), found

    def divergence(self, kept: Kept) -> float:
        """Of the model that keeps these sources, by weights that are zero for the others."""
        weights = dict(self.weights)
        for name, places in kept.items():
            weights[name] = np.zeros_like(self.weights[name])
            weights[name][list(places)] = self._fitted(name, places)
        return self._divergence(
            [
                jnp.asarray(np.stack([weights[kind, i] for i in layers]), jnp.float32)
                for kind, _, layers in chains(self.layout)
            ]
        )

    def build(self, kept: Kept) -> Decoder:
        """The model that keeps these sources."""
        weights = self.weights | {n: self._fitted(n, places) for n, places in kept.items()}
        arrays = {name: jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}
        return relayout(self.model, self._layout(kept), arrays)

    def _layout(self, kept: Kept) -> KVLayout:
        def pruned(kind: Kind, i: int, stream: Stream) -> Stream:
            if (kind, i) not in kept or len(kept[kind, i]) == len(stream.sources):
                return stream
            sources = tuple(stream.sources[place] for place in kept[kind, i])
            return dataclasses.replace(stream, sources=sources, mixing=Mixing(init="normal"))

        layers = tuple(
            dataclasses.replace(
                layer, key=pruned("key", i, layer.key), value=pruned("value", i, layer.value)
            )
            for i, layer in enumerate(self.layout.layers)
        )
        return dataclasses.replace(self.layout, layers=layers, spec="")

    def _fitted(self, name: StreamName, places: tuple[int, ...]) -> np.ndarray:
        """Weights of the sources that are kept: as they were, or refitted."""
        whole = self.weights[name]
        kept = list(places)
        if self.grams is None or len(kept) == len(whole):
            return whole[kept]
        gram = np.moveaxis(self.grams[name], (0, 1), (-2, -1))  # [*size, J, J]
        mixed = gram[..., kept, :] @ np.moveaxis(whole, 0, -1)[..., None]  # [*size, J', 1]
        inner = gram[..., kept, :][..., kept]
        inner = inner + 1e-9 * np.trace(inner, axis1=-2, axis2=-1)[..., None, None] * np.eye(
            len(kept)
        )
        return np.moveaxis(np.linalg.solve(inner, mixed)[..., 0], -1, 0)


def _fused(layout: KVLayout) -> Iterator[tuple[StreamName, Stream]]:
    for kind in KINDS:
        for i, layer in enumerate(layout.layers):
            stream = layer.stream(kind)
            if stream.is_fused and len(stream.sources) > 1:
                yield (kind, i), stream


def _log_probs(
    graph: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokens: Int[Array, "B T"],
    weights: list[Array] | None = None,
) -> Float[Array, "B T V"]:
    model = nnx.merge(graph, params)
    if weights is not None:
        for parameter, value in zip(model.mixing.weights, weights, strict=True):
            parameter.set_value(value)
    return jax.nn.log_softmax(model.logits(model.hidden(tokens)))


def _grams(
    model: Decoder, tokens: Int[Array, "B T"], streams: Mapping[StreamName, Stream]
) -> dict[StreamName, np.ndarray]:
    """Inner products of each stream's sources over a text, [J, J, *size of a weight]."""
    rows, length = tokens.shape
    cache = unstacked(KVCache.create(model.config, batch_size=rows, max_length=length))

    @jax.jit
    def fill(params: nnx.State, tokens: Array, cache: KVCache) -> KVCache:
        count = jnp.full(rows, length, jnp.int32)
        return nnx.merge(graph, params).extend(tokens, count, cache, "none")[1]

    graph, params = nnx.split(model)
    cache = fill(params, jnp.asarray(tokens), cache)
    found: dict[tuple, np.ndarray] = {}
    for (kind, _), stream in streams.items():
        if (kind, stream.sources, stream.weights) not in found:
            places = [cache.plan.places[kind, j] for j in stream.sources]
            storages = cache.keys if kind == "key" else cache.values
            sources = np.stack([np.asarray(storages[g][slot], np.float64) for g, slot in places])
            gram = np.einsum("ibskh,jbskh->ijkh", sources, sources)
            found[kind, stream.sources, stream.weights] = _per_weight(gram, kind, stream)
    return {
        (kind, i): found[kind, stream.sources, stream.weights]
        for (kind, i), stream in streams.items()
    }


def _per_weight(gram: np.ndarray, kind: Kind, stream: Stream) -> np.ndarray:
    """Sums over the heads and channels that share a weight; keys have one for a rotary pair."""
    if stream.weights == "scalar":
        return gram.sum((2, 3))
    if stream.weights == "head":
        return gram.sum(3)
    if kind == "key":
        gram = gram.reshape(*gram.shape[:3], 2, -1).sum(3)
    return gram.sum(2) if stream.weights == "shared_channel" else gram
