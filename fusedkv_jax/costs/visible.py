"""How many keys a query of a layer sees: causal, windowed, and without itself where cyclic."""

from __future__ import annotations

from fusedkv_jax.layouts import KINDS, KVLayout


def visible_to_last(layout: KVLayout, layer: int, length: int) -> int:
    """Keys that the last of `length` tokens sees in this layer.

    Itself and all before it, or the last W of those. A layer that reads one above itself does
    not see the token itself, whose stream is not computed yet.
    """
    seen = min(length, layout.layers[layer].window or length)
    return seen - _reads_above(layout, layer)


def visible_to_all(layout: KVLayout, layer: int, length: int) -> int:
    """Keys that `length` tokens see in this layer, added up over the tokens."""
    window = min(length, layout.layers[layer].window or length)
    growing = window * (window + 1) // 2
    return growing + (length - window) * window - length * _reads_above(layout, layer)


def visible_to_any(layout: KVLayout, layer: int, length: int) -> int:
    """Keys that at least one of `length` tokens sees in this layer."""
    return length - _reads_above(layout, layer)


def _reads_above(layout: KVLayout, layer: int) -> bool:
    return any(j > layer for kind in KINDS for j in layout.attended(kind, layer))
