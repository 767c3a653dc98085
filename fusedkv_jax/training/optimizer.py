"""The optimizer of the paper: AdamW with warm-up, cosine decay, clipping and a decay mask."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import PyTree

from fusedkv_jax.model import weight_decay_mask
from fusedkv_jax.training.optimizer_config import OptimizerConfig
from fusedkv_jax.validation import check_count, check_kind

Tree = TypeVar("Tree")


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of update i = 0 .. steps-1.

    With w warm-up steps: peak * (i+1)/w while i < w; then a half cosine that reaches
    final_fraction * peak at the last update. Counting from i+1 means that no update is wasted
    on a learning rate of zero and that the last one has exactly the final value.
    """
    check_kind("config", config, OptimizerConfig, "an OptimizerConfig")
    check_count("steps", steps)
    warmup = min(config.warmup_steps, steps // 2)
    cosine = optax.cosine_decay_schedule(
        config.learning_rate, max(steps - warmup, 1), alpha=config.final_fraction
    )

    def schedule(count: ArrayLike) -> jax.Array:
        done = jnp.asarray(count, jnp.float32) + 1.0
        rising = config.learning_rate * done / max(warmup, 1)
        return jnp.where(done <= warmup, rising, cosine(done - warmup))

    return schedule


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with the schedule over `steps` updates.

    Args:
      config: the hyperparameters.
      steps: number of updates of the whole run, where the cosine ends.

    Returns:
      A gradient transformation for the model's parameter state (`nnx.State` of `nnx.Param`).
    """
    schedule = learning_rate_schedule(config, steps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=weight_decay_mask,
        ),
    )


def select(use_new: jax.Array, new: PyTree, old: Tree) -> Tree:
    """`new` where the scalar `use_new` is true, otherwise `old`, leaf by leaf."""
    return jax.tree.map(lambda n, o: jnp.where(use_new, n, o), new, old)
