"""Which parameters training changes: all, those of layers that read others' caches, or LoRA's."""

from __future__ import annotations

from typing import Any, Literal

import optax
from flax import nnx
from jaxtyping import PyTree

from fusedkv_jax.layouts import KVLayout, runs
from fusedkv_jax.training.config import ExperimentConfig
from fusedkv_jax.training.lora import Chosen, Lora
from fusedkv_jax.training.optimizer import make_optimizer


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


def lora_of(config: ExperimentConfig) -> Lora | None:
    """What a run adapts; None if it trains parameters themselves. Raises as `chosen_parameters`."""
    rank, alpha = config.train.lora_rank, config.train.lora_alpha
    if not rank:
        return None
    chosen = chosen_parameters(config.model.kv_layout, config.train.trainable)
    return Lora(rank, alpha / rank, chosen)


def trained_parameters(config: ExperimentConfig) -> Chosen | None:
    """Which parameters of a run's state are trained; None for all; raises likewise."""
    if config.train.lora_rank:
        return lambda path, parameter: path[0] == "mixing" or isinstance(parameter, nnx.LoRAParam)
    return chosen_parameters(config.model.kv_layout, config.train.trainable)


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
    chosen = trained_parameters(config)
    return optimizer if chosen is None else only(optimizer, chosen)
