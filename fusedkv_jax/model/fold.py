"""Folds every parameterization of stream weights into direct weights, for inference."""

from __future__ import annotations

import dataclasses

from flax import nnx

from fusedkv_jax.layouts import KVLayout, LayerKV, Mixing, Stream
from fusedkv_jax.model.decoder import Decoder
from fusedkv_jax.model.mixing import chains, direct_weights
from fusedkv_jax.model.parameters import FusionWeight


def fold_fusion(model: Decoder) -> Decoder:
    """A model with the same outputs whose stream weights are stored as they are used.

    The recursion of the iterative parameterization, the convex mix and the scale are evaluated
    once. All other parameters are shared with `model`; a model whose weights are direct already is
    returned as it is.
    """
    layout = model.config.kv_layout
    mixings = [stream.mixing for _, stream, _ in chains(layout)]
    if all(mixing.parameterization == "direct" and mixing.scale == 1 for mixing in mixings):
        return model
    folded_layout = KVLayout(
        tuple(
            LayerKV(_direct(layer.key), _direct(layer.value), layer.window, layer.kv_norm)
            for layer in layout.layers
        ),
        passes=layout.passes,
    )
    config = dataclasses.replace(model.config, layout=folded_layout)
    folded = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    weights = [
        FusionWeight(direct_weights(stream, parameter[...]))
        for (_, stream, _), parameter in zip(chains(layout), model.mixing.weights, strict=True)
    ]
    for name in ("embedding", "runs", "final_norm", "head"):
        setattr(folded, name, getattr(model, name))
    folded.mixing.weights = nnx.List(weights)
    return folded


def _direct(stream: Stream) -> Stream:
    if stream.weights is None:
        return stream
    return dataclasses.replace(stream, mixing=Mixing(init="normal"))
