"""What a run computes, from its configuration and mesh: the state and the compiled step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.sharding import (
    automatic,
    batch_sharding,
    check_batch,
    parameter_shardings,
    spread,
)
from fusedkv_jax.training import distillation
from fusedkv_jax.training.config import ExperimentConfig
from fusedkv_jax.training.early_exit import make_objective
from fusedkv_jax.training.loss import Batch, Objective, batch_loss
from fusedkv_jax.training.optimizer import learning_rate_schedule
from fusedkv_jax.training.state import TrainState, abstract_model, abstract_state, create_state
from fusedkv_jax.training.step import BATCH_KEYS, Metrics, Step, StepOptions, make_train_step
from fusedkv_jax.training.trainable import lora_of, run_optimizer, trained_parameters


class TrainProgram:
    """The state and the step of one run.

    Nothing is computed before `create`. With a mesh of compile-only devices, `lower` and
    `compile()` of its result tell whether the run would fit.

    Args:
      config: the experiment.
      mesh: what the run is spread over.
      teacher: configuration of the teacher, where `distillation` needs one.

    Raises:
      MeshError: the batch does not divide over the mesh.
      ValueError: the layout has no layer that `train.trainable` speaks of; a teacher is missing,
        unused, or cannot be compared with the model.
    """

    def __init__(
        self, config: ExperimentConfig, mesh: Mesh, teacher: ModelConfig | None = None
    ) -> None:
        train = config.train
        distillation.check_teacher(config.distillation, config.model, teacher)
        check_batch(mesh, config.data.batch_size, config.data.seq_len, train.grad_accumulation)
        self.config, self.mesh = config, mesh
        self.graphdef, _ = abstract_model(config.model)
        self.optimizer = run_optimizer(config)
        self.lora = lora_of(config)
        self.constants: tuple[nnx.State, ...] = ()  # shapes of what each step is given besides
        self.teacher_graphdef = None
        if teacher is not None:
            self.teacher_graphdef, params = abstract_model(teacher)
            self.constants = (_with_shardings(params, mesh),)

    def create(self, params: nnx.State | None = None) -> TrainState:
        """The initial state.

        Args:
          params: initial parameters, of `config.model`; drawn by default.

        Raises:
          ValueError: there are none, and `train.lora_rank` adapts a model.
        """
        config = self.config
        if params is None and self.lora is not None:
            raise ValueError(
                f"train.lora_rank={config.train.lora_rank} adapts a trained model; start from one "
                "(--init_from), or leave it out"
            )
        seed, offload = config.train.seed, config.optimizer.offload
        state = create_state(config.model, self.optimizer, seed, self.mesh, offload, self.lora)
        if params is None:
            return state
        added, drawn = nnx.split_state(state.params, nnx.LoRAParam, ...)
        placed = jax.tree.map(
            # A copy, by the host: steps donate what they are given, and the caller's model would be
            # gone, as `device_put` to several devices leaves the given array on the first of them.
            lambda given, drawn: spread(np.array(given, drawn.dtype), drawn.sharding),
            params,
            drawn,
        )
        return dataclasses.replace(state, params=nnx.merge_state(placed, added))

    def model_parameters(self, params: nnx.State) -> nnx.State:
        """What the model computes with, from the parameters of a state; to be traced."""
        return params if self.lora is None else self.lora.apply(params)

    @functools.cached_property
    def state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        config = self.config
        offload = config.optimizer.offload
        return abstract_state(config.model, self.optimizer, self.mesh, offload, self.lora)

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
        """The step `(state, batch, *constants) -> (state, metrics)`, the state donated, to compile.

        The constants are the teacher's parameters, if there is one.

        To call under `jax.set_mesh`.
        """
        config, train = self.config, self.config.train
        options = StepOptions(
            microbatches=train.grad_accumulation,
            objective=self._objective(),
            gradient_dtype=None if train.gradient_dtype == "float32" else train.gradient_dtype,
            skip_spikes=config.optimizer.skip_spikes,
            chosen=trained_parameters(config) or True,
            model_parameters=self.model_parameters,
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
        return jitted.lower(self.state, self.batch, *self.constants)

    def _objective(self) -> Objective:
        config, train = self.config, self.config.train
        if self.teacher_graphdef is not None:
            return distillation.make_objective(
                config.distillation, self.teacher_graphdef, train.logits_mib
            )
        early_exits = make_objective(
            config.early_exit, config.model.num_layers, train.steps, train.seed, train.logits_mib
        )
        loss = functools.partial(batch_loss, logits_mib=train.logits_mib)
        return early_exits or (lambda step, batch: (batch, loss))


def _brings_to_device(step: Step) -> Step:
    def brought(
        state: TrainState, batch: Batch, *constants: nnx.State
    ) -> tuple[TrainState, Metrics]:
        opt_state = jax.device_put(state.opt_state, jax.memory.Space.Device)
        return step(dataclasses.replace(state, opt_state=opt_state), batch, *constants)

    return brought


def _with_shardings(params: nnx.State, mesh: Mesh) -> nnx.State:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        parameter_shardings(params, mesh),
    )
