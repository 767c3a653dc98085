"""The stream algebra: a layout is data that says, layer by layer, whose keys and values are read.

A layer has two streams, its keys and its values. **A stream with its own projection is cached; a
stream without one is rebuilt from cached streams of other layers when it is read.** Everything
else (what is allocated, how deep a prompt runs, what a decode step reads, how layers are scanned)
is derived from that here, never from a layout's name.

Layers count from 0.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fusedkv_jax.validation import build, validate

Kind = Literal["key", "value"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Granularity = Literal["scalar", "head", "channel", "shared_channel"]
Init = Literal["normal", "fan_in", "ones", "recursive", "own", "even"]
Parameterization = Literal["direct", "iterative", "convex"]


class LayoutError(ValueError):
    """A layout that makes no sense; the message says which layer, why, and what to change."""


@dataclass(frozen=True)
class Mixing:
    """How the learned weights of a stream are stored and where they start.

    Attributes:
        init: `normal` N(0, 1); `fan_in` N(0, 1/J) for J sources; `ones`; `recursive` (the FusedKV
            recursion over depth, run once on N(0, 1) draws); `own` (own projection 1, sources 0);
            `even` (all weights 1/J).
        parameterization: `direct` trains the weights; `iterative` trains the factors of the
            recursion and recomputes the weights from them; `convex` trains one weight w of the own
            stream and gives 1 - w to the single source.
        scale: weights are `scale` times the parameters (35 in YOCO++).
        anchor: position in `Stream.sources` of the source that gets the recursion's fresh term.

    Raises:
        LayoutError: a field of another type, or a scale that is not above 0.
    """

    init: Init = "normal"
    parameterization: Parameterization = "direct"
    scale: float = 1.0
    anchor: int = -1

    def __post_init__(self) -> None:
        validate(self, LayoutError, above={"scale": 0})


@dataclass(frozen=True)
class Stream:
    """Where the keys, or the values, of one layer come from.

    Attributes:
        own: the layer has its own projection for this stream, and caches it.
        sources: layers whose cached stream is read. With `own` and weights they are a residual
            that is mixed in before caching; with `own` and no weights the layer serves its
            projection to others while its attention reads the source.
        weights: granularity of the learned weights: one per `scalar`, `head`, (head, `channel`),
            or channel shared by all heads (`shared_channel`); None reuses one source unchanged.
        mixing: parameterization and initial values of the weights.
    """

    own: bool = False
    sources: tuple[int, ...] = ()
    weights: Granularity | None = None
    mixing: Mixing = Mixing()

    def __post_init__(self) -> None:
        validate(self, LayoutError)

    @property
    def is_residual(self) -> bool:
        """Sources are mixed into the own projection before it is cached."""
        return self.own and bool(self.sources) and self.weights is not None

    @property
    def is_fused(self) -> bool:
        """Cached streams of other layers are weighted when they are read."""
        return not self.own and self.weights is not None

    @property
    def reads_self(self) -> bool:
        """The layer's attention reads the layer's own cached stream."""
        return self.own and (not self.sources or self.is_residual)

    @property
    def terms(self) -> int:
        """Number of weighted terms: the sources, and the own projection after them."""
        return len(self.sources) + self.own


@dataclass(frozen=True)
class LayerKV:
    """The two streams of one layer.

    Attributes:
        key: the keys.
        value: the values.
        window: sliding attention window in tokens, the token itself included; None for full.
        kv_norm: keys and values are projected from their own norm of the layer's input, apart from
            the norm that the queries use (YOCO's shared cache).
    """

    key: Stream
    value: Stream
    window: int | None = None
    kv_norm: bool = False

    def __post_init__(self) -> None:
        validate(self, LayoutError)

    def stream(self, kind: Kind) -> Stream:
        return self.key if kind == "key" else self.value

    @property
    def caches(self) -> bool:
        return self.key.own or self.value.own


OWN = Stream(own=True)


def reuse(source: int) -> Stream:
    """A stream that reads one layer's cached stream unchanged."""
    return Stream(sources=(source,))


@dataclass(frozen=True)
class KVLayout:
    """Which layer caches what and which layer reads what, for a whole decoder.

    Attributes:
        layers: one `LayerKV` per layer.
        passes: (without gradient, with gradient) passes of a cyclic layout's parallel form; not
            used by others.
        spec: the text that `layouts.resolve` turns into this layout ("" if there is none).
        splits: layers at which equal layers are not scanned through, so that a model can stop
            there (early exits); they change nothing else.

    Raises:
        LayoutError: a source out of range, above its reader, or without a cache; a stream with
            nothing to read; weights missing or left over.
    """

    layers: tuple[LayerKV, ...]
    passes: tuple[int, int] = (7, 2)
    spec: str = field(default="", compare=False)
    splits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        validate(self, LayoutError)
        _check(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> KVLayout:
        """Rebuild a layout from `dataclasses.asdict` of one, lists in place of tuples allowed.

        Raises:
            LayoutError: something that is no field, no list or no layer; or as for the class.
        """

        def stream(fields: Mapping[str, Any], prefix: str) -> Stream:
            mixing = fields.get("mixing", {})
            if not isinstance(mixing, Mixing):
                mixing = build(Mixing, mixing, LayoutError, f"{prefix}mixing.")
            sources = _tuple(fields.get("sources", ()))
            return build(
                Stream, {**fields, "sources": sources, "mixing": mixing}, LayoutError, prefix
            )

        if not isinstance(fields, Mapping):
            raise LayoutError(f"layout={fields!r}; use fields by name")
        layers, given = [], fields.get("layers", ())
        if not isinstance(given, list | tuple):
            raise LayoutError(f"layers={given!r}; use a list with the fields of each layer")
        for i, layer in enumerate(given):
            if not isinstance(layer, Mapping):
                raise LayoutError(f"layers.{i}={layer!r}; use fields by name")
            parts = dict(layer)
            for kind in KINDS:
                if isinstance(parts.get(kind), Mapping):
                    parts[kind] = stream(parts[kind], f"layers.{i}.{kind}.")
            layers.append(build(LayerKV, parts, LayoutError, f"layers.{i}."))
        lists = {name: _tuple(fields[name]) for name in ("passes", "splits") if name in fields}
        return build(cls, {**fields, **lists, "layers": tuple(layers)}, LayoutError)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @functools.cached_property
    def cached_keys(self) -> tuple[int, ...]:
        """Layers whose keys are cached."""
        return self.cached("key")

    @functools.cached_property
    def cached_values(self) -> tuple[int, ...]:
        """Layers whose values are cached."""
        return self.cached("value")

    def cached(self, kind: Kind) -> tuple[int, ...]:
        return tuple(i for i, layer in enumerate(self.layers) if layer.stream(kind).own)

    @property
    def is_cyclic(self) -> bool:
        """Some layer reads a layer above itself."""
        return bool(self.cyclic_groups)

    @functools.cached_property
    def cyclic_groups(self) -> tuple[tuple[int, int], ...]:
        """Half-open ranges of layers, each of which is iterated by itself; upwards.

        A group begins with a layer that reads one above it and ends with the highest layer that
        its layers read (LCKV, arXiv 2405.10637). What lies between two groups runs once.
        """
        groups, start = [], 0
        while start < self.num_layers:
            top, i = start, start
            while i <= top:  # sources of sources, up to the first layer that nobody reaches
                top = max((top, *_reads(self.layers[i])))
                i += 1
            if top > start:
                groups.append((start, top + 1))
            start = top + 1
        return tuple(groups)

    def is_iterated(self, layer: int) -> bool:
        """The layer stands in a cyclic group."""
        return any(start <= layer < stop for start, stop in self.cyclic_groups)

    @functools.cached_property
    def prefill_depth(self) -> int:
        """Number of layers that prompt tokens pass through: all up to the last that caches."""
        if self.is_cyclic:
            return self.num_layers
        return 1 + max(i for i, layer in enumerate(self.layers) if layer.caches)

    @functools.cached_property
    def exits(self) -> tuple[int, ...]:
        """Numbers of lower layers that can run alone: none of them reads a layer above them.

        A cyclic group is iterated as a whole, so a model cannot stop within it.
        """
        return tuple(
            exit
            for exit in range(1, self.num_layers)
            if all(j < exit for layer in self.layers[:exit] for j in _reads(layer))
        )

    @functools.cached_property
    def cache_ratio(self) -> float:
        """Cached streams over those of a decoder in which every layer caches both."""
        return (len(self.cached_keys) + len(self.cached_values)) / (2 * self.num_layers)

    def readers(self, kind: Kind, source: int) -> tuple[int, ...]:
        """Layers whose attention reads the cached stream of `source`, itself included.

        A residual (own projection with sources) is not among them: it mixes the new tokens only.
        """
        return tuple(i for i in range(self.num_layers) if source in self.attended(kind, i))

    def attended(self, kind: Kind, layer: int) -> tuple[int, ...]:
        """Layers whose cached `kind` stream the attention of `layer` reads."""
        stream = self.layers[layer].stream(kind)
        return (layer,) if stream.reads_self else stream.sources

    @functools.cached_property
    def _stored(self) -> dict[tuple[Kind, int], int | None]:
        """Stored length per cached stream: None for all tokens, or the last W only.

        A stream keeps the longest length that one of its readers needs, and all streams that one
        attention reads together keep the same length, so that their positions line up.
        """
        endless = 1 << 62
        stored: dict[tuple[Kind, int], int] = dict.fromkeys(
            ((kind, i) for kind in KINDS for i in self.cached(kind)), 0
        )
        groups: list[tuple[list[tuple[Kind, int]], int]] = [
            (
                [(kind, j) for kind in KINDS for j in self.attended(kind, i)],
                layer.window or endless,
            )
            for i, layer in enumerate(self.layers)
        ]
        changed = True
        while changed:
            changed = False
            for streams, window in groups:
                longest = max(window, *(stored[s] for s in streams))
                changed |= any(stored[s] != longest for s in streams)
                stored.update(dict.fromkeys(streams, longest))
        return {s: None if length == endless else length for s, length in stored.items()}

    def stored_window(self, kind: Kind, layer: int) -> int | None:
        """Tokens of this cached stream that must be kept: the last W, or all (None)."""
        return self._stored[kind, layer]


def _tuple(value: object) -> object:
    """Lists of JSON as tuples; anything else is left to validation."""
    return tuple(value) if isinstance(value, list) else value


def _reads(layer: LayerKV) -> tuple[int, ...]:
    return layer.key.sources + layer.value.sources


def _check(layout: KVLayout) -> None:
    if not layout.layers:
        raise LayoutError("a layout needs at least one layer")
    forward, backward = layout.passes
    if forward < 0 or backward < 1:
        raise LayoutError(f"passes={layout.passes}: use (>= 0, >= 1), for example (7, 2)")
    for split in layout.splits:
        if not 0 < split < layout.num_layers:
            raise LayoutError(f"splits={layout.splits}; use layers 1 to {layout.num_layers - 1}")
    for i, kind, stream in _streams(layout):
        problem = _stream_problem(layout, i, kind, stream)
        if problem:
            raise LayoutError(f"layer {i}, {kind}s: {problem}")
    for i, layer in enumerate(layout.layers):
        if layer.window is not None and layer.window < 1:
            raise LayoutError(f"layer {i}: window={layer.window}; use at least 1, or None")
        if layer.window == 1 and any(j > i for j in _reads(layer)):
            raise LayoutError(
                f"layer {i}: with a source above, a token does not see itself, so window=1 leaves"
                " it nothing; use at least 2"
            )
        if layer.kv_norm and not layer.caches:
            raise LayoutError(f"layer {i}: kv_norm without a projection of its own; set it False")


def _streams(layout: KVLayout) -> Iterator[tuple[int, Kind, Stream]]:
    for i, layer in enumerate(layout.layers):
        for kind in KINDS:
            yield i, kind, layer.stream(kind)


def _stream_problem(layout: KVLayout, i: int, kind: Kind, stream: Stream) -> str | None:
    if not stream.own and not stream.sources:
        return "no projection and no source; give it one of them"
    if len(set(stream.sources)) != len(stream.sources):
        return f"sources {stream.sources} repeat; name each layer once"
    for j in stream.sources:
        if not 0 <= j < layout.num_layers:
            return f"source {j} is not a layer; layers are 0 to {layout.num_layers - 1}"
        if j == i:
            return f"source {j} is the layer itself; use own=True"
        if j > i and stream.weights is not None:
            return f"source {j} lies above its reader; only unweighted reuse may read upwards"
        if not layout.layers[j].stream(kind).own:
            return f"source {j} does not cache its {kind}s; name a layer that does"
    if stream.weights is None:
        if len(stream.sources) > 1:
            return (
                f"{len(stream.sources)} sources but no weights;"
                f" choose {', '.join(get_args(Granularity))}"
            )
        if stream.own and not layout.readers(kind, i):
            return "cached, but no attention reads it; drop the projection or the source"
        return None
    return _weights_problem(stream)


def _weights_problem(stream: Stream) -> str | None:
    mixing = stream.mixing
    if stream.own and not stream.sources:
        return "weights on its own projection alone; drop them, or name a source"
    if mixing.parameterization == "convex" and not (stream.own and len(stream.sources) == 1):
        return "convex weights are for an own projection and one source"
    if mixing.init == "own" and not stream.own:
        return "init='own' needs an own projection"
    if "recursive" in (mixing.init, mixing.parameterization) or (
        mixing.parameterization == "iterative"
    ):
        if stream.own or not -len(stream.sources) <= mixing.anchor < len(stream.sources):
            return "the recursion needs sources only, and an anchor among them"
    return None
