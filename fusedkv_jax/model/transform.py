"""Model surgery: the same parameters in another form. Nothing is trained, outputs stay.

Every operation takes layers out with `layers_of` and puts them together with `rebuild`.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

from fusedkv_jax.layouts import Kind, KVLayout, LayerKV, Mixing, Stream, runs
from fusedkv_jax.model.block import Block
from fusedkv_jax.model.decoder import Decoder
from fusedkv_jax.model.mixing import chains, direct_weights
from fusedkv_jax.model.parameters import FusionWeight
from fusedkv_jax.validation import check_kind

Layer = tuple[nnx.GraphDef[Block], PyTree]  # structure and parameters of one block
Forms = MutableMapping[
    Decoder, tuple[list[Array], Decoder]
]  # parameters, and what was made of them

_folded: Forms = weakref.WeakKeyDictionary()
_unrolled: Forms = weakref.WeakKeyDictionary()


def layers_of(model: Decoder) -> list[Layer]:
    """Every layer by itself, from the bottom up."""
    found: dict[int, Layer] = {}
    for run, blocks in zip(runs(model.config.kv_layout), model.runs, strict=True):
        for place, block in enumerate(blocks):
            for repeat, i in enumerate(run.layers(place)):
                if isinstance(block, nnx.List):
                    found[i] = nnx.split(block[repeat])
                    continue
                graph, params = nnx.split(block)
                found[i] = graph, jax.tree.map(lambda leaf, r=repeat: leaf[r], params)
    return [found[i] for i in range(model.config.num_layers)]


def rebuild(
    model: Decoder,
    layout: KVLayout | None = None,
    *,
    weights: Sequence[FusionWeight] | None = None,
    unrolled: bool | None = None,
    layers: Sequence[Layer] | None = None,
) -> Decoder:
    """A model with the parameters of `model`; what need not be regrouped is shared with it.

    Args:
        model: the model.
        layout: each layer must have the projections that it has in the model; by default the
            model's own.
        weights: stored stream weights of each chain of the layout; by default those of the model.
        unrolled: whether equal layers have arrays of their own instead of stacked ones; by default
            as in the model.
        layers: other layers than those of the model.
    """
    old = model.config.kv_layout
    layout = old if layout is None else layout
    config = dataclasses.replace(model.config, layout=layout)
    result = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    for name in ("embedding", "final_norm", "head"):
        setattr(result, name, getattr(model, name))
    result.mixing.weights = nnx.List(list(model.mixing.weights if weights is None else weights))
    was = any(isinstance(block, nnx.List) for run in model.runs for block in run)
    unrolled = was if unrolled is None else unrolled
    if layers is None and runs(layout) == runs(old) and unrolled == was:
        result.runs = model.runs
        return result
    layers, join = layers or layers_of(model), _apart if unrolled else _stacked
    result.runs = nnx.List(
        [
            nnx.List([join([layers[i] for i in run.layers(p)]) for p in range(run.period)])
            for run in runs(layout)
        ]
    )
    return result


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
    if weights is None:
        return rebuild(model, layout)
    stacked = [jnp.stack([weights[kind, i] for i in layers]) for kind, _, layers in chains(layout)]
    return rebuild(model, layout, weights=[FusionWeight(array) for array in stacked])


def split_at(model: Decoder, layer: int) -> Decoder:
    """The model with its layers grouped so that it can stop below `layer`."""
    layout = model.config.kv_layout
    if layer in {run.start for run in runs(layout)}:
        return model
    return rebuild(model, dataclasses.replace(layout, splits=(*layout.splits, layer)))


def fold_fusion(model: Decoder) -> Decoder:
    """A model with the same outputs whose stream weights are stored as they are used.

    The recursion of the iterative parameterization, the convex mix and the scale are evaluated
    once. All other parameters are shared with `model`; a model whose weights are direct already is
    returned as it is. The result lives as long as the model, unless its parameters change.
    """
    check_kind("model", model, Decoder, "a Decoder")
    layout = model.config.kv_layout
    mixings = [stream.mixing for _, stream, _ in chains(layout)]
    if all(mixing.parameterization == "direct" and mixing.scale == 1 for mixing in mixings):
        return model
    return _remembered(_folded, _fold, model)


def _fold(model: Decoder) -> Decoder:
    layout = model.config.kv_layout
    folded = tuple(
        LayerKV(_direct(layer.key), _direct(layer.value), layer.window, layer.kv_norm)
        for layer in layout.layers
    )
    # The recursion of a chain is a product over the layers below, evaluated for each token that is
    # decoded unless it is stored as what it gives.
    weights: dict[tuple[Kind, int], Array] = {}
    for (kind, stream, layers), parameter in zip(chains(layout), model.mixing.weights, strict=True):
        direct = direct_weights(stream, parameter[...])
        weights |= {(kind, i): direct[c] for c, i in enumerate(layers)}
    # The named layout would train other parameters, so the name does not hold any more.
    return relayout(model, dataclasses.replace(layout, layers=folded, spec=""), weights)


def _direct(stream: Stream) -> Stream:
    if stream.weights is None:
        return stream
    return dataclasses.replace(stream, mixing=Mixing(init="normal"))


def unroll_layers(model: Decoder) -> Decoder:
    """A model with the same outputs in which equal layers are neither stacked nor scanned.

    A scan takes each layer's matrices out of the stacked ones, and XLA on CPU copies them at every
    step: more than a decoding step's products themselves take. Unrolled, 28 million parameters
    decode a batch of 8 in 0.8 of the time (fp32, two cores). The program then grows with depth.
    The parameters of layers are copied, all others shared with `model`.
    """
    return rebuild(model, unrolled=True)


LEAST_BYTES = 2**21  # of a layer: smaller ones stay in the processor's cache, copied or not


def for_decoding(model: Decoder) -> Decoder:
    """The form of a model that decodes fastest on the default device.

    On a CPU that is `unroll_layers(model)`, if its layers are large; the copy lives as long as the
    model, unless its parameters change. Elsewhere it is the model itself.
    """
    leaves = jax.tree.leaves(nnx.state(model.runs, nnx.Param))
    size = sum(leaf.nbytes for leaf in leaves) / model.config.num_layers
    if jax.default_backend() != "cpu" or size < LEAST_BYTES:
        return model
    return _remembered(_unrolled, unroll_layers, model)


def _remembered(forms: Forms, make: Callable[[Decoder], Decoder], model: Decoder) -> Decoder:
    """Another form of a model, made anew only when its parameters have changed."""
    # By identity, as arrays do not change and comparing numbers would read the model. The arrays
    # are kept so that no other can get their identity.
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    known, form = forms.get(model, ([], model))
    if len(known) != len(leaves) or any(a is not b for a, b in zip(known, leaves, strict=True)):
        form = make(model)
        forms[model] = (leaves, form)
    return form


def _stacked(layers: list[Layer]) -> Block | nnx.List:
    return nnx.merge(layers[0][0], jax.tree.map(lambda *x: jnp.stack(x), *[p for _, p in layers]))


def _apart(layers: list[Layer]) -> Block | nnx.List:
    return nnx.List([nnx.merge(*layer) for layer in layers])
