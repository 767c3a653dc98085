"""A model's parameters under another layout: the same layers, grouped or fused in another way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from fusedkv_jax.layouts import Kind, KVLayout, runs
from fusedkv_jax.model.decoder import Decoder
from fusedkv_jax.model.mixing import chains
from fusedkv_jax.model.parameters import FusionWeight


def relayout(
    model: Decoder, layout: KVLayout, weights: Mapping[tuple[Kind, int], Array] | None = None
) -> Decoder:
    """A model of another layout with the parameters of `model`.

    Args:
        model: the model; parameters outside its layers are shared with it.
        layout: each layer must have the projections that it has in the model.
        weights: stored parameters [terms, ...] of each weighted stream, by kind and layer; by
            default those of the model, whose weighted streams the layout must then have.
    """
    config = dataclasses.replace(model.config, layout=layout)
    result = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    if weights is None:
        mixing = list(model.mixing.weights)
    else:
        mixing = [
            FusionWeight(jnp.stack([weights[kind, i] for i in layers]))
            for kind, _, layers in chains(layout)
        ]
    layers = _layers(model)
    unrolled = any(isinstance(block, nnx.List) for run in model.runs for block in run)
    join = _apart if unrolled else _stacked
    moved = [
        [join([layers[i] for i in run.layers(place)]) for place in range(run.period)]
        for run in runs(layout)
    ]
    for name in ("embedding", "final_norm", "head"):
        setattr(result, name, getattr(model, name))
    result.runs = nnx.List([nnx.List(blocks) for blocks in moved])
    result.mixing.weights = nnx.List(mixing)
    return result


def split_at(model: Decoder, layer: int) -> Decoder:
    """The model with its layers grouped so that it can stop below `layer`."""
    layout = model.config.kv_layout
    if layer in {run.start for run in runs(layout)}:
        return model
    return relayout(model, dataclasses.replace(layout, splits=(*layout.splits, layer)))


def _layers(model: Decoder) -> list[tuple[Any, Any]]:
    """(structure, parameters) of every layer."""
    found: list[Any] = [None] * model.config.num_layers
    for run, blocks in zip(runs(model.config.kv_layout), model.runs, strict=True):
        for place, block in enumerate(blocks):
            for repeat, i in enumerate(run.layers(place)):
                if isinstance(block, nnx.List):
                    found[i] = nnx.split(block[repeat])
                    continue
                graph, params = nnx.split(block)
                found[i] = graph, jax.tree.map(lambda leaf, r=repeat: leaf[r], params)
    return found


def _stacked(layers: list[tuple[Any, Any]]) -> Any:
    return nnx.merge(layers[0][0], jax.tree.map(lambda *x: jnp.stack(x), *[p for _, p in layers]))


def _apart(layers: list[tuple[Any, Any]]) -> Any:
    return nnx.List([nnx.merge(*layer) for layer in layers])
