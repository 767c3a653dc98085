"""A plain-text drawing of a layout: which layer caches what, which reads what."""

from __future__ import annotations

from fusedkv_jax.layouts.algebra import KINDS, Kind, KVLayout
from fusedkv_jax.layouts.grouping import runs
from fusedkv_jax.validation import check_kind


def draw(layout: KVLayout) -> str:
    """Draw a layout, the top layer first, with its prefill depth, cache ratio and reads below.

    `[K 3]` is a stream that layer 3 projects and caches; `K 0 & 5` a learned fusion of two cached
    streams; `K 5` plain reuse; `[V 3 + 0]` an own stream with a learned residual, cached mixed.
    """
    check_kind("layout", layout, KVLayout, "a KVLayout, such as layouts.get('fusedkv', 12)")
    rows: list[tuple[str, ...]] = [("layer", "keys", "values", "window", "")]
    for i in reversed(range(layout.num_layers)):
        layer = layout.layers[i]
        note = "prompt tokens stop below" if i == layout.prefill_depth else ""
        note = "own KV norm" if layer.kv_norm else note
        cells = [_cell(layout, kind, i) for kind in KINDS]
        rows.append((str(i), *cells, str(layer.window or "full"), note))
    widths = [max(len(row[c]) for row in rows) for c in range(4)]
    lines = [
        "  ".join([row[0].rjust(widths[0]), *(row[c].ljust(widths[c]) for c in (1, 2, 3)), row[4]])
        for row in rows
    ]
    return "\n".join([*(line.rstrip() for line in lines), "", *_summary(layout)])


def _cell(layout: KVLayout, kind: Kind, i: int) -> str:
    stream = layout.layers[i].stream(kind)
    letter = "K" if kind == "key" else "V"
    names = list(map(str, stream.sources))
    if stream.reads_self:
        return "[" + " + ".join([f"{letter} {i}", *names]) + "]"
    weighted = f" ({stream.weights})" if stream.weights else ""
    above = " above" if stream.sources[0] > i else ""
    serves = f" serves {letter} {i}" if stream.own else ""
    return f" {letter} " + " & ".join(names) + weighted + above + serves


def _summary(layout: KVLayout) -> list[str]:
    terms = [len(layout.attended(kind, i)) for kind in KINDS for i in range(layout.num_layers)]
    grouped = " + ".join(
        f"{run.repeats} x {run.period}" if run.period > 1 else str(run.repeats)
        for run in runs(layout)
    )
    lines = [
        f"layout         {layout.spec or 'unnamed'}",
        f"caches         {len(layout.cached_keys)} keys, {len(layout.cached_values)} values:"
        f" {layout.cache_ratio:.1%} of {layout.num_layers} caching layers",
        f"reads          {sum(terms) / len(terms):.2f} cached streams per layer and kind",
        f"prefill_depth  {layout.prefill_depth} of {layout.num_layers} layers",
        f"scanned as     {grouped} layers",
    ]
    if layout.is_cyclic:
        lines.append(f"cyclic         passes {layout.passes[0]} + {layout.passes[1]} with gradient")
    return lines
