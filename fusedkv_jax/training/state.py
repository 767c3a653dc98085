"""The state of a training run: one pytree that the train step takes, donates and returns."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.model import Decoder
from fusedkv_jax.sharding import MeshError, automatic, parameter_shardings
from fusedkv_jax.training.lora import Lora
from fusedkv_jax.trees import Leaf

RECENT_STEPS = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step.

    Attributes:
      step: [] int32, batches seen so far.
      skipped: [] int32, those of them that did not update the weights because the loss or the
        gradient norm was not finite, or a spike.
      recent: loss and gradient norm of the last steps, by step modulo their number; float32,
        negative where there is none.
      params: `nnx.State` of the model's `nnx.Param`s, and of LoRA's.
      opt_state: the optimizer's state.
    """

    step: Leaf
    skipped: Leaf
    recent: dict[str, Leaf]
    params: nnx.State
    opt_state: optax.OptState


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure and its parameters as shapes, without computing anything.

    Returns:
      (graphdef, params) with `jax.ShapeDtypeStruct` leaves; `nnx.merge(graphdef, params)` with
      arrays of these shapes is the model.
    """
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, params


def create_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh | None = None,
    offload: bool = False,
    lora: Lora | None = None,
) -> TrainState:
    """Initial parameters and optimizer state, computed in one compiled program.

    Args:
      config: the model's configuration.
      optimizer: the transformation whose state is made.
      seed: of the parameters, which do not depend on the mesh.
      mesh: the arrays are split over it, and never whole on one device; None uses one device.
      offload: on a mesh, the optimizer's state is in the host's memory.
      lora: how the model is adapted, if it is.

    Raises:
      MeshError: `offload` on several CPU devices, with a jax that does not compile it.
    """
    initial = lambda seed: _initial_state(config, optimizer, seed, lora)  # noqa: E731
    if mesh is None:
        return jax.jit(initial)(seed)
    shardings = _shardings(jax.eval_shape(initial, seed), mesh, offload)
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    with jax.set_mesh(mesh):
        return jax.jit(automatic(initial, specs), out_shardings=shardings)(seed)


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    offload: bool = False,
    lora: Lora | None = None,
) -> TrainState:
    """Shapes, dtypes and (on a mesh) shardings of `create_state`, for restoring into."""
    shapes = jax.eval_shape(lambda: _initial_state(config, optimizer, 0, lora))
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        _shardings(shapes, mesh, offload),
    )


def _shardings(shapes: TrainState, mesh: Mesh, offload: bool) -> TrainState:
    shardings = parameter_shardings(shapes, mesh)
    if not offload:
        return shardings
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    if on_cpu and mesh.size > 1 and jax.__version_info__ >= (0, 11):
        # Its compiler ends the process (seen with jax 0.11.2, whatever the optimizations).
        raise MeshError(
            f"optimizer.offload=True on {mesh.size} CPU devices is not compiled by jax "
            f"{jax.__version__}; use one device, an accelerator, or no offload"
        )

    def on_host(
        leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
    ) -> jax.sharding.Sharding:  # XLA keeps no scalars there
        return sharding.with_memory_kind("pinned_host") if leaf.shape else sharding

    moved = jax.tree.map(on_host, shapes.opt_state, shardings.opt_state)
    return dataclasses.replace(shardings, opt_state=moved)


def _initial_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    seed: int | jax.Array,
    lora: Lora | None,
) -> TrainState:
    rngs = nnx.Rngs(jax.random.key(seed))
    params = nnx.state(Decoder(config, rngs=rngs), nnx.Param)
    return initial_state(params if lora is None else lora.add(params, seed), optimizer)


def initial_state(params: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, with these parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        recent={name: jnp.full(RECENT_STEPS, -1.0, jnp.float32) for name in ("loss", "grad_norm")},
        params=params,
        # Adam's moments stay float32 also for bfloat16 parameters.
        opt_state=optimizer.init(jax.tree.map(lambda p: p.astype(jnp.float32), params)),
    )
