"""Streams of layers above those that read them, which a walk upwards comes to too late.

The first walk takes them from the original, the next ones from the walk before: each is a pass of
the layout's parallel form, and learns to read what the one before has made.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Array

from fusedkv_jax.interop.uptrain.layers import (
    Heads,
    StreamName,
    finish,
    project,
    rotation_of,
    with_projections,
)
from fusedkv_jax.layouts import KINDS, Kind, KVLayout
from fusedkv_jax.model import Decoder
from fusedkv_jax.model.transform import layers_of


def read_from_above(layout: KVLayout) -> set[StreamName]:
    """The streams that a layer below their own reads."""
    return {
        (kind, j)
        for i, layer in enumerate(layout.layers)
        for kind in KINDS
        for j in layer.stream(kind).sources
        if j > i
    }


def look_ahead(
    model: Decoder,
    layout: KVLayout,
    sources: dict[StreamName, np.ndarray],
    inputs: list[Array],
) -> list[dict[StreamName, Array]]:
    """Those streams, of the hidden states of a model under another layout.

    Args:
        model: the original.
        layout: the new one.
        sources: its new projections [D, K, H].
        inputs: hidden states [B, T, D] that enter the first layer, in parts.
    """
    read, layers, found = read_from_above(layout), layers_of(model), []
    for x in inputs:
        streams: dict[StreamName, Array] = {}
        for i in range(max((j + 1 for _, j in read), default=0)):
            rotation = rotation_of(model, i, x.shape[:2])
            mine: list[Kind] = [kind for kind in KINDS if (kind, i) in read]
            if mine:
                anew: dict[Kind, np.ndarray] = {
                    kind: sources[kind, i] for kind in mine if (kind, i) in sources
                }
                own = project(with_projections(layers[i], anew), x, rotation)[1]
                streams |= {(kind, i): own[kind] for kind in mine}
            q, own = project(layers[i], x, rotation)
            heads = Heads(q, own["key"], own["value"])
            x = finish(layers[i], x, heads, model.config.kv_layout.layers[i].window)[1]
        found.append(streams)
    return found
