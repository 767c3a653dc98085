"""The loss, and one training step as a pure function of (state, batch)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from fusedkv_jax.training.optimizer import select
from fusedkv_jax.training.state import TrainState

Batch = dict[str, Any]  # of [B, T] arrays: NumPy from the data pipeline, or traced
Metrics = dict[str, jax.Array]
Loss = Callable[[nnx.GraphDef, nnx.State, Batch], Any]  # gives (sum of the losses, count)
Objective = Callable[[jax.Array, Batch], tuple[Batch, Loss]]  # from the step's number

BATCH_KEYS = ("tokens", "targets", "segment_ids", "positions", "loss_mask")


def sum_cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], mask: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Negative log-likelihood in nats, summed over the tokens that count.

    Sums and counts are returned apart, so that means over microbatches, padded batches and
    whole data sets are exact.

    Args:
      logits: unnormalised scores; the softmax is computed in float32.
      targets: next-token ids; ids at masked places are ignored and may be negative.
      mask: [B, T] bool or number, nonzero where the target counts.

    Returns:
      (sum of the losses, number of targets counted), both float32.
    """
    counted = mask != 0
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.where(counted, targets, 0)
    )  # [B, T]
    # where, not a product: an infinite loss at a padding place must not become NaN.
    return jnp.where(counted, losses, 0.0).sum(), counted.sum(dtype=jnp.float32)


def batch_loss(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch):
    """`sum_cross_entropy` of a batch under the model (graphdef, params)."""
    logits = nnx.merge(graphdef, params)(
        batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"]
    )
    return sum_cross_entropy(logits, batch["targets"], batch["loss_mask"])


def split_rows(batch: Batch, parts: int) -> Batch:
    """[B, ...] arrays as [parts, B/parts, ...].

    A part takes every parts-th row, not a contiguous block: where rows are spread over devices,
    each part then still has rows on every device.
    """
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )


def accumulate_gradients(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    batch: Batch,
    microbatches: int,
    loss: Loss = batch_loss,
) -> tuple[jax.Array, nnx.State]:
    """Mean loss and its gradient over a batch that is computed in `microbatches` parts.

    The gradient of the summed loss is accumulated in float32 and divided by the token count of
    the whole batch, so the result does not depend on how padding falls into the parts.

    Returns:
      (mean loss [] float32, gradients in float32 with the structure of params).
    """
    value_and_grad = jax.value_and_grad(lambda p, part: loss(graphdef, p, part), has_aux=True)

    def one_part(carry, part):
        (total, count), grads = value_and_grad(params, part)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return jax.tree.map(jnp.add, carry, (total, count, grads)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    start = (jnp.float32(0), jnp.float32(0), zeros)
    if microbatches == 1:
        (total, count, grads), _ = one_part(start, batch)
    else:
        (total, count, grads), _ = jax.lax.scan(one_part, start, split_rows(batch, microbatches))
    count = jnp.maximum(count, 1.0)
    return total / count, jax.tree.map(lambda g: g / count, grads)


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    microbatches: int = 1,
    objective: Objective | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Build the train step; compile it with `jax.jit(step, donate_argnums=0)`.

    The step returns the new state and the metrics loss, grad_norm (before clipping),
    learning_rate and skipped (so far). Where the loss or the gradient norm is not finite,
    parameters and optimizer state stay as they were and `skipped` grows by one.

    Args:
      graphdef: the model's structure.
      optimizer: the transformation whose state is in the train state.
      schedule: learning rate of update i, for the metrics.
      microbatches: parts that the batch is divided into to save memory; divides its rows.
      objective: gives the loss of a step and what it needs in the batch; by default the
        cross-entropy of the model's output.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch, loss_of = (batch, batch_loss) if objective is None else objective(state.step, batch)
        loss, grads = accumulate_gradients(graphdef, state.params, batch, microbatches, loss_of)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        skipped = state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.skipped),
            "skipped": skipped,
        }
        new_state = TrainState(
            step=state.step + 1,
            skipped=skipped,
            params=select(finite, params, state.params),
            opt_state=select(finite, opt_state, state.opt_state),
        )
        return new_state, metrics

    return train_step
