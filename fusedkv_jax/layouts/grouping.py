"""Groups the layers of a layout into runs of equal structure, which the model stacks and scans.

A run is a body of `period` consecutive layers, repeated `repeats` times. CLA-2 is a body of two
layers; FusedKV is two runs of one-layer bodies; a window hybrid's bodies have four layers. Two
bodies are equal if each layer has the same streams, weights, window and stored lengths, and reads
the same layers: those inside its own body by their place in it, others by number.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusedkv_jax.layouts.algebra import KINDS, Kind, KVLayout
from fusedkv_jax.validation import check_kind


@dataclass(frozen=True)
class Run:
    """`repeats` equal bodies of `period` layers, from layer `start` on."""

    start: int
    period: int
    repeats: int

    @property
    def stop(self) -> int:
        return self.start + self.period * self.repeats

    def layers(self, place: int) -> range:
        """The layers at one place of the body, in order of the repeats."""
        return range(self.start + place, self.stop, self.period)

    def is_local(self, reader: int, source: int) -> bool:
        """Reader and source stand in the same body (so the source's streams are at hand)."""
        body = (reader - self.start) // self.period
        return self.start <= source < self.stop and (source - self.start) // self.period == body


def runs(layout: KVLayout) -> tuple[Run, ...]:
    """Partition the layers into runs, longest first from the bottom up.

    No run crosses `prefill_depth` (prompt tokens stop there), an end of a cyclic group (which is
    iterated) or one of the layout's `splits`.
    """
    check_kind("layout", layout, KVLayout, "a KVLayout, such as layouts.get('fusedkv', 12)")
    borders = {layout.prefill_depth, layout.num_layers, *sum(layout.cyclic_groups, ())}
    borders.update(layout.splits)
    result, start = [], 0
    while start < layout.num_layers:
        stop = min(b for b in borders if b > start)
        result.append(_longest(layout, start, stop))
        start = result[-1].stop
    return tuple(result)


def _longest(layout: KVLayout, start: int, stop: int) -> Run:
    best = Run(start, 1, 1)
    for period in range(1, (stop - start) // 2 + 1):
        run = Run(start, period, _repeats(layout, start, stop, period))
        if run.repeats > 1 and run.stop > best.stop:
            best = run
    return best


def _repeats(layout: KVLayout, start: int, stop: int, period: int) -> int:
    first = _body(layout, start, start, period)
    repeats = 1
    while start + (repeats + 1) * period <= stop:
        if _body(layout, start, start + repeats * period, period) != first:
            break
        repeats += 1
    return repeats


def _body(layout: KVLayout, start: int, begin: int, period: int) -> tuple:
    """What must be equal between two bodies; one that reads an earlier body equals no other."""
    described = []
    for i in range(begin, begin + period):
        layer = layout.layers[i]
        described.append((layer.window, layer.kv_norm))
        for kind in KINDS:
            stream = layer.stream(kind)
            if any(start <= j < begin for j in stream.sources):
                return (i,)
            places = tuple(
                ("here", j - begin) if begin <= j < i else ("layer", j) for j in stream.sources
            )
            stored = layout.stored_window(kind, i) if stream.own else None
            described.append((stream.own, places, stream.weights, stream.mixing, stored))
    return tuple(described)


def exported(layout: KVLayout, kind: Kind) -> tuple[int, ...]:
    """Layers whose streams are read by layers outside their own body, residuals included."""
    needed = set()
    for run in runs(layout):
        for i in range(run.start, run.stop):
            for j in layout.layers[i].stream(kind).sources:
                if j > i or not run.is_local(i, j):
                    needed.add(j)
    return tuple(sorted(needed))
