"""Training for early exits: layer dropout, and a loss on what lower layers predict.

LayerSkip (arXiv 2404.16710). A model trained so can draft for itself
(`fusedkv_jax.generation.SelfSpeculation`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fusedkv_jax.model import Decoder
from fusedkv_jax.training.early_exit_config import EarlyExitConfig
from fusedkv_jax.training.loss import Batch, Loss, Objective, head_cross_entropy


def make_objective(
    config: EarlyExitConfig,
    num_layers: int,
    steps: int,
    seed: int,
    logits_mib: float | None = None,
) -> Objective | None:
    """The training objective of a run, for `make_train_step`; None where both parts are off.

    Which layers a row skips depends on seed, step and row alone, so gradient accumulation changes
    nothing.

    Args:
      config: what is on.
      num_layers: layers L of the model.
      steps: batches T of the run.
      seed: of the layer dropout.
      logits_mib: as for `head_cross_entropy`.
    """
    if not (config.max_dropout or config.loss_scale) or num_layers == 1:
        return None

    def objective(step: Array, batch: Batch) -> tuple[Batch, Loss]:
        weights = exit_weights(config, num_layers, step, steps)
        if config.max_dropout:
            rates = dropout_rates(config, num_layers, step, steps)
            rows = batch["tokens"].shape[0]
            batch = batch | {"kept": kept_layers(rates, seed, step, rows)}

        def loss(graphdef: nnx.GraphDef, params: nnx.State, part: Batch) -> tuple[Array, Array]:
            model, early = nnx.merge(graphdef, params), bool(config.loss_scale)
            return exit_loss(model, part, weights, early, logits_mib)

        return batch, loss

    return objective


def dropout_rates(
    config: EarlyExitConfig, num_layers: int, step: Int[Array, ""], steps: int
) -> Float[Array, "L"]:
    """Probability with which each layer is skipped."""
    depth = jnp.arange(num_layers, dtype=jnp.float32) / max(num_layers - 1, 1)
    rates = config.max_dropout * (2.0**depth - 1)
    if config.dropout_curriculum == "exponential":
        rates = rates * (2.0 ** (step / max(steps - 1, 1)) - 1)
    return rates


def kept_layers(
    rates: Float[Array, "L"], seed: int, step: Int[Array, ""], rows: int
) -> Bool[Array, "B L"]:
    """Layers that each row of a step's batch does not skip."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.uniform(key, (rows, rates.shape[0]), jnp.float32) >= rates


def exit_weights(
    config: EarlyExitConfig, num_layers: int, step: Int[Array, ""], steps: int
) -> Float[Array, "L"]:
    """Weight of each layer's loss at a step; they sum to 1, and the last one is never 0."""
    layer, last = jnp.arange(num_layers, dtype=jnp.float32), num_layers - 1
    if config.weights == "cumulative":
        weight = config.loss_scale * jnp.cumsum(layer)
        top = last + weight[last - 1]
    else:
        sizes = {"uniform": jnp.ones_like(layer), "linear": layer + 1, "inverse": 1 / (layer + 1)}
        size = sizes.get(config.weights, jnp.sqrt(layer + 1))
        weight, top = config.loss_scale * size, size[last]
    if config.curriculum == "rotational":
        enabled = (jnp.arange(num_layers) - step) % config.rotation == 0
    elif config.curriculum == "gradual":
        enabled = step >= 0.5 * steps * (num_layers - layer) / num_layers
    else:
        enabled = jnp.ones(num_layers, bool)
    weight = jnp.where(enabled, weight, 0.0).at[last].set(top)
    return weight / weight.sum()


def exit_loss(
    model: Decoder,
    batch: Batch,
    weights: Float[Array, "L"],
    early: bool = True,
    logits_mib: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted `head_cross_entropy` of the exits of all layers, with the shared norm and head.

    Layers of weight 0 cost nothing, whichever they are at this step.

    Args:
      model: a `Decoder`.
      batch: as for `batch_loss`; and "kept", rows that each layer changes, [B, L].
      weights: of the layers.
      early: False leaves out all but the last layer, whose weight is then 1.
      logits_mib: as for `head_cross_entropy`.
    """
    outputs = model.layer_outputs(
        batch["tokens"], batch["segment_ids"], batch["positions"], batch.get("kept")
    )

    def loss(x: Array) -> tuple[Array, Array]:
        targets, mask = batch["targets"], batch["loss_mask"]
        normed, cap = model.normed(x), model.config.logit_softcap
        return head_cross_entropy(normed, model.head_matrix, targets, mask, logits_mib, cap)

    total, count = loss(outputs[-1])
    if not early:
        return total, count

    # Recomputed in the backward pass: the gradients of all exits together would be too many.
    exit_total = jax.checkpoint(lambda x: loss(x)[0])

    def add(total: Array, layer: tuple[Array, Array]) -> tuple[Array, None]:
        x, weight = layer
        found = jax.lax.cond(
            weight > 0, lambda: weight * exit_total(x), lambda: jnp.zeros((), jnp.float32)
        )
        return total + found, None

    total, _ = jax.lax.scan(add, weights[-1] * total, (outputs[:-1], weights[:-1]))
    return total, count
