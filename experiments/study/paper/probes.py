"""What is looked at inside a trained model: its fusion weights, its streams, its gradients."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

import fusedkv_jax as fkv
from fusedkv_jax import data, training
from fusedkv_jax.data import DataConfig
from fusedkv_jax.layouts import KINDS
from fusedkv_jax.model.transform import layers_of
from fusedkv_jax.training.step import BATCH_KEYS, accumulate_gradients

BATCHES = 4  # of held-out text, whose gradient is taken
Rows = Mapping[str, np.ndarray]


class Weights(TypedDict):
    """Of one fused stream, for each of its sources.

    Attributes:
      layer, kind: of the reader; "key" or "value".
      sources: layers.
      mean, rms: over heads and channels.
    """

    layer: int
    kind: str
    sources: list[int]
    mean: list[float]
    rms: list[float]


class Norms(TypedDict):
    """Norms of the loss's gradient, for each layer from the bottom up.

    Attributes:
      all: of all parameters of the layer but fusion weights.
      key, value: of its key and value projections; None where it has none.
    """

    all: list[float]
    key: list[float | None]
    value: list[float | None]


class Gradients(Norms):
    """The same after some step of training."""

    step: int


class Inside(TypedDict):
    """What a record says of a model.

    Attributes:
      weights: after the last step.
      streams: root mean square of what each layer caches, by kind and layer.
      gradients: at each checkpoint, on equal held-out text.
    """

    weights: list[Weights]
    streams: dict[str, dict[str, float]]
    gradients: list[Gradients]


def measure(workdir: pathlib.Path) -> Inside:
    """Look at the checkpoints of a finished run, the newest for all but the gradients."""
    model, config, last = training.load_model(workdir)
    steps = training.committed_steps(training.checkpoint_directory(workdir))
    batch = _heldout(config.data)
    gradients = [_gradients(workdir, step, batch) for step in steps]
    assert gradients[-1]["step"] == last
    return {"weights": weights(model), "streams": streams(model, batch), "gradients": gradients}


def weights(model: fkv.Decoder) -> list[Weights]:
    """The fusion weights as they are applied; none of a layout without them."""
    layout = model.config.kv_layout
    return [
        {
            "layer": layer,
            "kind": kind,
            "sources": [*layout.layers[layer].stream(kind).sources],
            "mean": [_short(weight.mean()) for weight in found],
            "rms": [_rms(weight) for weight in found],
        }
        for (kind, layer), found in model.mixing().items()
    ]


def streams(model: fkv.Decoder, batch: Rows) -> dict[str, dict[str, float]]:
    """Root mean square of the cached keys and values over the tokens of a batch, by layer."""
    tokens = jnp.asarray(batch["tokens"])
    rows, length = tokens.shape
    cache = fkv.KVCache.create(model.config, batch_size=rows, max_length=length)
    _, cache = fkv.prefill(model, tokens, jnp.full(rows, length, jnp.int32), cache)
    found: dict[str, dict[str, float]] = {}
    for kind, stored in zip(KINDS, (cache.keys, cache.values), strict=True):
        layers = (getattr(group, f"{kind}s") for group in cache.plan.groups)
        found[kind] = {
            str(layer): _rms(stream)
            for numbers, array in zip(layers, stored, strict=True)
            for layer, stream in zip(numbers, np.asarray(array), strict=True)
        }
    return found


def _heldout(config: DataConfig) -> Rows:
    """The first rows of the held-out text, as one batch."""
    batches = [*data.make_eval_batches(config, BATCHES)]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in BATCH_KEYS}


def _gradients(workdir: pathlib.Path, step: int, batch: Rows) -> Gradients:
    model, _, _ = training.load_model(workdir, step)
    return {"step": step, **norms(model, batch)}


def norms(model: fkv.Decoder, batch: Rows) -> Norms:
    """Norms of the gradient of a batch's mean loss; BATCHES divides its rows."""
    graph, params = nnx.split(model, nnx.Param)
    _, gradient = _gradient(
        graph, params, {name: jnp.asarray(array) for name, array in batch.items()}
    )
    layers = [params for _, params in layers_of(nnx.merge(graph, gradient))]
    return {
        "all": [_norm(jax.tree.leaves(layer)) for layer in layers],
        "key": [_projection(layer, "k_proj") for layer in layers],
        "value": [_projection(layer, "v_proj") for layer in layers],
    }


_gradient = jax.jit(
    lambda graph, params, batch: accumulate_gradients(graph, params, batch, BATCHES),
    static_argnums=0,
)


def _projection(layer: PyTree, name: str) -> float | None:
    """Norm of what is below a name; None where there is nothing."""
    found = jax.tree_util.tree_leaves_with_path(layer)
    arrays = [leaf for path, leaf in found if f"['{name}']" in jax.tree_util.keystr(path)]
    return _norm(arrays) if arrays else None


def _norm(arrays: Sequence[jax.Array]) -> float:
    return _short(jnp.sqrt(sum(jnp.sum(jnp.square(array)) for array in arrays)))


def _rms(array: jax.Array | np.ndarray) -> float:
    return _short(np.sqrt(np.mean(np.square(array))))


def _short(value: jax.Array | np.ndarray | np.floating) -> float:
    """As many digits as float32 has, at most."""
    return float(f"{float(value):.6g}")
