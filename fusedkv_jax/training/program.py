"""What a run computes, from its configuration and mesh: the state and the compiled step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fusedkv_jax.sharding import automatic, batch_sharding, check_batch
from fusedkv_jax.training.config import ExperimentConfig
from fusedkv_jax.training.early_exit import make_objective
from fusedkv_jax.training.loss import Batch, Objective, batch_loss
from fusedkv_jax.training.optimizer import learning_rate_schedule
from fusedkv_jax.training.state import TrainState, abstract_model, abstract_state, create_state
from fusedkv_jax.training.step import BATCH_KEYS, Metrics, Step, StepOptions, make_train_step
from fusedkv_jax.training.trainable import chosen_parameters, run_optimizer


class TrainProgram:
    """The state and the step of one run.

    Nothing is computed before `create`. With a mesh of compile-only devices, `lower` and
    `compile()` of its result tell whether the run would fit.

    Args:
      config: the experiment.
      mesh: what the run is spread over.

    Raises:
      MeshError: the batch does not divide over the mesh.
      ValueError: the layout has no layer that `train.trainable` speaks of.
    """

    def __init__(self, config: ExperimentConfig, mesh: Mesh) -> None:
        train = config.train
        check_batch(mesh, config.data.batch_size, config.data.seq_len, train.grad_accumulation)
        self.config, self.mesh = config, mesh
        self.graphdef, _ = abstract_model(config.model)
        self.optimizer = run_optimizer(config)

    def create(self, params: nnx.State | None = None) -> TrainState:
        """The initial state.

        Args:
          params: initial parameters, of `config.model`; drawn by default.
        """
        config = self.config
        seed, offload = config.train.seed, config.optimizer.offload
        state = create_state(config.model, self.optimizer, seed, self.mesh, offload)
        if params is None:
            return state
        placed = jax.tree.map(
            lambda given, drawn: jax.device_put(given.astype(drawn.dtype), drawn.sharding),
            params,
            state.params,
        )
        return dataclasses.replace(state, params=placed)

    @functools.cached_property
    def state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        config = self.config
        return abstract_state(config.model, self.optimizer, self.mesh, config.optimizer.offload)

    @functools.cached_property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
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

    def lower(self) -> jax.stages.Lowered:
        """The step `(state, batch) -> (state, metrics)`, the state donated, ready to `compile()`.

        To call under `jax.set_mesh`.
        """
        config, train = self.config, self.config.train
        options = StepOptions(
            microbatches=train.grad_accumulation,
            objective=self._objective(),
            gradient_dtype=None if train.gradient_dtype == "float32" else train.gradient_dtype,
            skip_spikes=config.optimizer.skip_spikes,
            chosen=chosen_parameters(config.model.kv_layout, train.trainable) or True,
        )
        schedule = learning_rate_schedule(config.optimizer, train.steps)
        step = make_train_step(self.graphdef, self.optimizer, schedule, options)
        if config.optimizer.offload:
            step = _brings_to_device(step)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
        # Donated: parameters and moments are updated in place, and never there twice.
        jitted = jax.jit(
            automatic(step, (specs, P())), donate_argnums=0, out_shardings=(shardings, None)
        )
        return jitted.lower(self.state, self.batch)

    def _objective(self) -> Objective:
        config, train = self.config, self.config.train
        early_exits = make_objective(
            config.early_exit, config.model.num_layers, train.steps, train.seed, train.logits_mib
        )
        loss = functools.partial(batch_loss, logits_mib=train.logits_mib)
        return early_exits or (lambda step, batch: (batch, loss))


def _brings_to_device(step: Step) -> Step:
    def brought(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        opt_state = jax.device_put(state.opt_state, jax.memory.Space.Device)
        return step(dataclasses.replace(state, opt_state=opt_state), batch)

    return brought
