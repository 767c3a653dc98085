"""What a run computes, from its configuration and mesh: the state and the compiled step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fusedkv_jax.sharding import batch_sharding, check_batch
from fusedkv_jax.training.config import ExperimentConfig
from fusedkv_jax.training.early_exit import make_objective
from fusedkv_jax.training.optimizer import learning_rate_schedule, make_optimizer
from fusedkv_jax.training.state import TrainState, abstract_model, abstract_state, create_state
from fusedkv_jax.training.step import BATCH_KEYS, Batch, make_train_step


class TrainProgram:
    """The state and the step of one run.

    Nothing is computed before `create`. With a mesh of devices that are not there, `lower` and
    `compile()` of its result tell whether the run would fit.

    Args:
      config: the experiment.
      mesh: what the run is spread over.

    Raises:
      MeshError: the batch does not divide over the mesh.
    """

    def __init__(self, config: ExperimentConfig, mesh: Mesh):
        train = config.train
        check_batch(mesh, config.data.batch_size, config.data.seq_len, train.grad_accumulation)
        self.config, self.mesh = config, mesh
        self.graphdef, _ = abstract_model(config.model)
        self.optimizer = make_optimizer(config.optimizer, train.steps)

    def create(self) -> TrainState:
        """The initial state."""
        return create_state(self.config.model, self.optimizer, self.config.train.seed, self.mesh)

    @functools.cached_property
    def state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return abstract_state(self.config.model, self.optimizer, self.mesh)

    @functools.cached_property
    def batch(self) -> Batch:
        """Shapes, dtypes and shardings of the whole batch, over all processes."""
        data = self.config.data
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(
                (data.batch_size, data.seq_len),
                jnp.float32 if name == "loss_mask" else jnp.int32,
                sharding=sharding,
            )
            for name in BATCH_KEYS
        }

    def lower(self) -> Any:
        """The step `(state, batch) -> (state, metrics)`, the state donated, ready to `compile()`.

        To call under `jax.set_mesh`.
        """
        config, train = self.config, self.config.train
        step = make_train_step(
            self.graphdef,
            self.optimizer,
            learning_rate_schedule(config.optimizer, train.steps),
            train.grad_accumulation,
            make_objective(config.early_exit, config.model.num_layers, train.steps, train.seed),
        )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        return jitted.lower(self.state, self.batch)
