"""The loss of a model that is trained to be like a teacher."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.model import Decoder
from fusedkv_jax.training.distillation_config import DistillationConfig
from fusedkv_jax.training.loss import (
    Batch,
    Loss,
    Objective,
    head_cross_entropy,
    logits_at_a_time,
)


def make_objective(
    config: DistillationConfig, teacher: nnx.GraphDef, logits_mib: float | None = None
) -> Objective:
    """The training objective of a run with a teacher, for `make_train_step`.

    Args:
      config: what is compared.
      teacher: structure of the teacher, whose parameters each step is given.
      logits_mib: as for `head_cross_entropy`.
    """

    def objective(step: Array, batch: Batch, params: nnx.State) -> tuple[Batch, Loss]:
        def loss(graphdef: nnx.GraphDef, student: nnx.State, part: Batch) -> tuple[Array, Array]:
            models = nnx.merge(graphdef, student), nnx.merge(teacher, params)
            return distillation_loss(*models, part, config, logits_mib)

        return batch, loss

    return objective


def check_teacher(
    config: DistillationConfig, model: ModelConfig, teacher: ModelConfig | None
) -> None:
    """Raise ValueError unless there is a teacher where one is needed, that fits the model."""
    if config.is_on != (teacher is not None):
        raise ValueError(
            "distillation needs a teacher"
            if config.is_on
            else "a teacher is given, but distillation.logits and distillation.hidden are 0"
        )
    if teacher is None:
        return
    names = ("vocab_size",) + (("num_layers", "d_model") if config.hidden else ())
    for name in names:
        mine, other = getattr(model, name), getattr(teacher, name)
        if mine != other:
            raise ValueError(
                f"the teacher has {name}={other}, the model {mine}; choose the model that this one "
                "was made from" + (", or distillation.hidden=0" if name != "vocab_size" else "")
            )


def distillation_loss(
    model: Decoder,
    teacher: Decoder,
    batch: Batch,
    config: DistillationConfig,
    logits_mib: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The weighted losses of a batch, summed over its targets, and their number.

    Args:
      model: the one that learns.
      teacher: the one that it learns from.
      batch: as for `batch_loss`.
      config: the weights.
      logits_mib: as for `head_cross_entropy`.
    """
    targets, mask = batch["targets"], batch["loss_mask"] != 0
    both = [_outputs(one, batch, bool(config.hidden)) for one in (model, teacher)]
    (layers, x), (other_layers, other) = both
    total, count = jnp.float32(0), mask.sum(dtype=jnp.float32)
    if config.text:
        cap = model.config.logit_softcap
        loss = head_cross_entropy(x, model.head_matrix, targets, mask, logits_mib, cap)[0]
        total += config.text * loss
    if config.logits:
        compared = _divergence((model, teacher), (x, other), mask, config.temperature, logits_mib)
        total += config.logits * compared
    if layers is not None and other_layers is not None:
        total += config.hidden * _distance(layers, other_layers, mask)
    return total, count


def _outputs(model: Decoder, batch: Batch, all_layers: bool) -> tuple[Array | None, Array]:
    """What every layer gives, if asked for, and what the output head takes."""
    given = batch["tokens"], batch["segment_ids"], batch["positions"]
    if not all_layers:
        return None, model.hidden(*given)
    outputs = model.layer_outputs(*given)
    return outputs, model.normed(outputs[-1])


def _distance(mine: Array, other: Array, mask: Array) -> Array:
    """Squared distances relative to the square of `other`, averaged over layers."""
    mine, other = mine.astype(jnp.float32), other.astype(jnp.float32)
    size = (other**2).sum(-1)  # [L, B, T]
    # Padding is token 0, whose embedding some models keep at zero: its gradient would be NaN.
    relative = ((mine - other) ** 2).sum(-1) / jnp.where(size > 0, size, 1.0)
    return jnp.where(mask, relative.mean(0), 0.0).sum()


def _divergence(
    models: tuple[Decoder, Decoder],
    outputs: tuple[Array, Array],
    mask: Array,
    temperature: float,
    logits_mib: float | None,
) -> Array:
    """KL(teacher | model) times the squared temperature, summed over the tokens that count.

    The logits are never whole: tokens are taken in chunks, which the backward pass computes again.
    """
    vocabulary = models[0].config.vocab_size
    count = mask.size
    both = 2 * vocabulary  # of two models
    limit = max(1, logits_at_a_time(logits_mib, both) // both)
    chunks = -(-count // limit)
    padding = -count % chunks

    def split(array: Array) -> Array:
        flat = array.reshape(count, *array.shape[mask.ndim :])
        padded = jnp.pad(flat, ((0, padding), *((0, 0),) * (flat.ndim - 1)))
        return padded.reshape(chunks, -1, *flat.shape[1:])

    @jax.checkpoint
    def of_chunk(part: tuple[Array, Array, Array]) -> Array:
        mine, other, counted = part
        logs = [
            jax.nn.log_softmax(model.logits(x) / temperature)
            for model, x in zip(models, (mine, other), strict=True)
        ]
        losses = jnp.sum(jnp.exp(logs[1]) * (logs[1] - logs[0]), -1)
        return jnp.where(counted, losses, 0.0).sum()

    parts = (split(outputs[0]), split(jax.lax.stop_gradient(outputs[1])), split(mask))
    add = lambda total, part: (total + of_chunk(part), None)  # noqa: E731
    return temperature**2 * jax.lax.scan(add, jnp.float32(0), parts)[0]
