"""A toy experiment: a four-layer FusedKV model on a folder of made-up text."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.data import DataConfig
from fusedkv_jax.sharding import MeshConfig
from fusedkv_jax.training import (
    ExperimentConfig,
    OptimizerConfig,
    TrainConfig,
    TrainState,
    create_state,
    make_optimizer,
)
from fusedkv_jax.training.state import initial_state


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> pathlib.Path:
    """40 documents of 100 to 400 characters, a few of them not ASCII."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["cache", "layer", "key", "value", "fuse", "größer", "注意", "\n", "0123"]
    for i in range(40):
        text = " ".join(rng.choice(words, size=rng.integers(20, 80)))
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def toy(text_folder) -> ExperimentConfig:
    return ExperimentConfig(
        name="toy",
        model=ModelConfig(
            vocab_size=258,
            num_layers=4,
            d_model=16,
            num_heads=2,
            d_ff=32,
            max_length=64,
            layout="fusedkv",
        ),
        data=DataConfig(source=str(text_folder), seq_len=32, batch_size=4, holdout_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        train=TrainConfig(steps=40, eval_batches=0, checkpoint_every=20),
        mesh=MeshConfig(devices=1),
    )


@pytest.fixture(scope="session")
def toy_params(toy) -> nnx.State:
    """Initial parameters of the toy model; not to be donated."""
    return create_state(toy.model, optax.sgd(1.0), seed=0).params


@pytest.fixture
def toy_state(toy, toy_params) -> TrainState:
    """A fresh state of the toy experiment, with arrays of its own."""
    params = jax.tree.map(jnp.copy, toy_params)
    return initial_state(params, make_optimizer(toy.optimizer, toy.train.steps))


@pytest.fixture
def with_train(toy):
    """with_train(steps=3): the toy experiment with other training settings."""

    def change(**settings) -> ExperimentConfig:
        return dataclasses.replace(toy, train=dataclasses.replace(toy.train, **settings))

    return change
