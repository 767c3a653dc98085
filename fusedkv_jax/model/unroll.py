"""Layers with arrays of their own, for decoding on processors.

A scan takes each layer's matrices out of the stacked ones, and XLA on CPU copies them at every
step: more than a decoding step's products themselves take. Unrolled, 28 million parameters decode
a batch of 8 in 0.8 of the time (fp32, two cores). The program then grows with depth.
"""

from __future__ import annotations

import weakref
from typing import Any

import jax
from flax import nnx

from fusedkv_jax.model.decoder import Decoder

LEAST_BYTES = 2**21  # of a layer: smaller ones stay in the processor's cache, copied or not

_unrolled: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def for_decoding(model: Decoder) -> Decoder:
    """The form of a model that decodes fastest on the default device.

    On a CPU that is `unroll_layers(model)`, if its layers are large; the copy lives as long as the
    model, unless its parameters change. Elsewhere it is the model itself.
    """
    leaves = jax.tree.leaves(nnx.state(model.runs, nnx.Param))
    size = sum(leaf.nbytes for leaf in leaves) / model.config.num_layers
    if jax.default_backend() != "cpu" or size < LEAST_BYTES:
        return model
    known, unrolled = _unrolled.get(model, ([], model))
    if len(known) != len(leaves) or any(a is not b for a, b in zip(known, leaves, strict=True)):
        unrolled = unroll_layers(model)
        _unrolled[model] = (leaves, unrolled)
    return unrolled


def unroll_layers(model: Decoder) -> Decoder:
    """A model with the same outputs in which equal layers are neither stacked nor scanned.

    The parameters of layers are copied, all others shared with `model`.
    """
    copied = nnx.eval_shape(lambda: Decoder(model.config, rngs=nnx.Rngs(0)))
    for name in ("embedding", "final_norm", "head", "mixing"):
        setattr(copied, name, getattr(model, name))
    copied.runs = nnx.List([nnx.List([_apart(block) for block in run]) for run in model.runs])
    return copied


def _apart(stacked: Any) -> Any:
    if isinstance(stacked, nnx.List):
        return stacked
    graph, params = nnx.split(stacked)
    repeats = jax.tree.leaves(params)[0].shape[0]
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(repeats)]
    return nnx.List([nnx.merge(graph, layer) for layer in layers])
