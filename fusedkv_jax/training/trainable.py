"""Which parameters training changes: all, or those of layers that read other layers' caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import optax
from flax import nnx
from jaxtyping import PyTree

from fusedkv_jax.layouts import KVLayout, runs
from fusedkv_jax.training.config import ExperimentConfig
from fusedkv_jax.training.optimizer import make_optimizer

Chosen = Callable[[tuple[Any, ...], object], bool]  # of a parameter's path and the parameter


def chosen_parameters(layout: KVLayout, trainable: Literal["all", "changed"]) -> Chosen | None:
    """Which parameters are trained; None for all.

    With "changed" they are the stream weights, and whole layers that have no keys or no values of
    their own: what a model that was converted to this layout has lost is in them.

    Raises:
      ValueError: no layer of the layout is of this kind.
    """
    if trainable == "all":
        return None
    readers = [not (layer.key.own and layer.value.own) for layer in layout.layers]
    if not any(readers):
        raise ValueError(
            "train.trainable='changed': every layer of this layout has keys and values of its own; "
            "choose 'all'"
        )
    groups = runs(layout)

    def chosen(path: tuple[Any, ...], parameter: object) -> bool:
        if path[0] == "mixing":
            return True
        # Layers at one place of a run are alike, and stacked.
        return path[0] == "runs" and readers[groups[path[1]].layers(path[2])[0]]

    return chosen


def only(optimizer: optax.GradientTransformation, chosen: Chosen) -> optax.GradientTransformation:
    """An optimizer that is given all parameters or the chosen ones, and keeps state for these."""

    def init(params: PyTree) -> optax.OptState:
        return optimizer.init(nnx.filter_state(params, chosen))

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree = None
    ) -> tuple[PyTree, optax.OptState]:
        return optimizer.update(
            nnx.filter_state(updates, chosen), state, nnx.filter_state(params, chosen)
        )

    return optax.GradientTransformation(init, update)


def run_optimizer(config: ExperimentConfig) -> optax.GradientTransformation:
    """The optimizer of a run; raises as `chosen_parameters`."""
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    chosen = chosen_parameters(config.model.kv_layout, config.train.trainable)
    return optimizer if chosen is None else only(optimizer, chosen)
