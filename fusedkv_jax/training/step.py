"""The loss, and one training step as a pure function of (state, batch)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fusedkv_jax.sharding import matrix_name
from fusedkv_jax.training.loss import Batch, Loss, Objective, Sums, batch_loss
from fusedkv_jax.training.optimizer import select
from fusedkv_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
_Totals = tuple[jax.Array, jax.Array, nnx.State]  # losses, targets that count, gradients
Step = Callable[..., tuple[TrainState, Metrics]]

BATCH_KEYS = ("tokens", "targets", "segment_ids", "positions", "loss_mask")


def split_rows(batch: Batch, parts: int) -> Batch:
    """[B, ...] arrays as [parts, B/parts, ...].

    A part takes every parts-th row, not a contiguous block: where rows are spread over devices,
    each part then still has rows on every device.
    """
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )


def cast_matrices(params: nnx.State, dtype: DTypeLike) -> nnx.State:
    """Parameters with their matrices, but not norms and fusion weights, in another type."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if matrix_name(path) is None else leaf.astype(dtype), params
    )


def accumulate_gradients(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    batch: Batch,
    microbatches: int,
    loss: Loss = batch_loss,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, nnx.State]:
    """Mean loss and its gradient over a batch that is computed in `microbatches` parts.

    The gradient of the summed loss is accumulated in float32 and divided by the token count of
    the whole batch, so the result does not depend on how padding falls into the parts.

    Args:
      graphdef, params: the model.
      batch: [B, T] arrays.
      microbatches: the parts; divides B.
      loss: gives a part's summed loss and count.
      dtype: of the matrices that are differentiated, and so of one part's gradients when they are
        reduced over devices; None leaves the parameters' own.

    Returns:
      (mean loss [] float32, gradients in float32 with the structure of params).
    """
    value_and_grad = jax.value_and_grad(lambda p, part: loss(graphdef, p, part), has_aux=True)
    if dtype is not None:
        params = cast_matrices(params, dtype)

    def one_part(carry: _Totals, part: Batch) -> tuple[_Totals, None]:
        (total, count), grads = value_and_grad(params, part)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return jax.tree.map(jnp.add, carry, (total, count, grads)), None

    # In float32: a sum of many bfloat16 gradients would drop the small ones.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    start = (jnp.float32(0), jnp.float32(0), zeros)
    if microbatches == 1:
        (total, count, grads), _ = one_part(start, batch)
    else:
        (total, count, grads), _ = jax.lax.scan(one_part, start, split_rows(batch, microbatches))
    count = jnp.maximum(count, 1.0)
    return total / count, jax.tree.map(lambda g: g / count, grads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What a training step does beside one update by a batch's cross-entropy.

    Attributes:
      microbatches: parts that the batch is divided into to save memory; divides its rows.
      objective: gives the loss of a step and what it needs in the batch; by default the
        cross-entropy of the model's output.
      gradient_dtype: as `dtype` of `accumulate_gradients`.
      skip_spikes: as for `is_spike`; 0 skips none.
      chosen: the parameters that are trained, by default all. The others have no gradient, and
        count in no norm; the optimizer takes the chosen ones alone.
      model_parameters: gives what the loss takes, from the parameters of the state.
    """

    microbatches: int = 1
    objective: Objective | None = None
    gradient_dtype: DTypeLike | None = None
    skip_spikes: float = 0.0
    chosen: nnx.filterlib.Filter = True
    model_parameters: Callable[[nnx.State], nnx.State] = lambda params: params


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    options: StepOptions = StepOptions(),
) -> Step:
    """Build the train step; compile it with `jax.jit(step, donate_argnums=0)`.

    The step returns the new state and the metrics loss, grad_norm (before clipping),
    learning_rate and skipped (so far). Where the loss or the gradient norm is not finite, or a
    spike, parameters and optimizer state stay as they were and `skipped` grows by one.

    Args:
      graphdef: the model's structure.
      optimizer: the transformation whose state is in the train state.
      schedule: learning rate of update i, for the metrics.
      options: what else it does.
    """
    objective, deviations = options.objective, options.skip_spikes

    def train_step(
        state: TrainState, batch: Batch, *constants: nnx.State
    ) -> tuple[TrainState, Metrics]:
        loss_of: Loss = batch_loss
        if objective is not None:
            batch, loss_of = objective(state.step, batch, *constants)
        # Only what is differentiated is trained: a mask of updates would compute all gradients.
        trained, frozen = nnx.split_state(state.params, options.chosen, ...)

        def loss_of_all(graphdef: nnx.GraphDef, params: nnx.State, part: Batch) -> Sums:
            whole = options.model_parameters(nnx.merge_state(params, frozen))
            return loss_of(graphdef, whole, part)

        loss, grads = accumulate_gradients(
            graphdef, trained, batch, options.microbatches, loss_of_all, options.gradient_dtype
        )
        grad_norm = optax.tree.norm(grads)
        new = {"loss": loss, "grad_norm": grad_norm}
        accepted = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if deviations:
            spikes = [is_spike(state.recent[name], new[name], deviations) for name in new]
            accepted &= ~jnp.any(jnp.stack(spikes))
        # Decided by values on the device: a branch on the host would wait for each step.
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        trained = select(accepted, optax.apply_updates(trained, updates), trained)
        skipped = state.skipped + jnp.where(accepted, 0, 1).astype(jnp.int32)
        metrics = {
            **new,
            "learning_rate": schedule(state.step - state.skipped),
            "skipped": skipped,
        }
        new_state = TrainState(
            step=state.step + 1,
            skipped=skipped,
            recent={name: _record(state, name, value) for name, value in new.items()},
            params=nnx.merge_state(trained, frozen),
            opt_state=select(accepted, opt_state, state.opt_state),
        )
        return new_state, metrics

    return train_step


def is_spike(recent: Float[Array, "R"], value: Float[Array, ""], deviations: float) -> jax.Array:
    """Whether a value is far above the recent ones.

    It is where it exceeds their mean by more than `deviations` standard deviations, once half of
    the places are filled. Skipped values are recent ones too: a level that stays is not skipped
    for long.

    Args:
      recent: values of the last steps, negative where there is none.
      value: the new one.
      deviations: the bound; 6 of 128 steps is the choice of OLMo-core's SkipStepOptimizer.
    """
    there = recent >= 0
    count = jnp.maximum(there.sum(), 1)
    mean = jnp.where(there, recent, 0.0).sum() / count
    variance = jnp.where(there, (recent - mean) ** 2, 0.0).sum() / count
    return (2 * count >= recent.size) & (value > mean + deviations * jnp.sqrt(variance))


def _record(state: TrainState, name: str, value: jax.Array) -> jax.Array:
    recent = state.recent[name]
    return recent.at[state.step % recent.size].set(jnp.where(jnp.isfinite(value), value, -1.0))
