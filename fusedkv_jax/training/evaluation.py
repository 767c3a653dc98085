"""Loss on held-out text: exact sums over padded batches, in nats per token and bits per byte."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fusedkv_jax import processes
from fusedkv_jax.sharding import automatic, process_rows, put_batch
from fusedkv_jax.training.loss import Batch, batch_loss
from fusedkv_jax.training.monitoring.metrics import bits_per_byte
from fusedkv_jax.training.step import BATCH_KEYS, split_rows


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Sums over an evaluation, from which every figure follows.

    Attributes:
      loss_sum: negative log-likelihood in nats, summed over the targets.
      num_tokens: targets counted.
      num_bytes: UTF-8 bytes of the text that those targets stand for.
    """

    loss_sum: float
    num_tokens: int
    num_bytes: int

    @property
    def metrics(self) -> dict[str, float]:
        """loss (nats per token), perplexity (per token) and bits_per_byte."""
        loss = self.loss_sum / self.num_tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": bits_per_byte(self.loss_sum, self.num_bytes),
        }


def make_eval_step(
    graphdef: nnx.GraphDef,
    microbatches: int = 1,
    logits_mib: float | None = None,
    model_parameters: Callable[[nnx.State], nnx.State] = lambda params: params,
) -> Callable[[nnx.State, Batch], tuple[jax.Array, jax.Array]]:
    """Build the compiled function (params, batch) -> (loss sum, token count).

    Args:
      graphdef: the model's structure.
      microbatches: parts that a batch is computed in one after the other; divides its rows.
      logits_mib: as for `head_cross_entropy`.
      model_parameters: gives what the model computes with, from `params`.
    """

    def eval_step(params: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        parts, params = split_rows(batch, microbatches), model_parameters(params)
        losses, counts = jax.lax.map(
            lambda part: batch_loss(graphdef, params, part, logits_mib), parts
        )
        return losses.sum(), counts.sum()

    return jax.jit(automatic(eval_step, P()))


def evaluate(
    eval_step: Callable[[nnx.State, Batch], tuple[jax.Array, jax.Array]],
    params: nnx.State,
    batches: Iterable[Mapping[str, Any]],
    mesh: Mesh | None = None,
) -> EvalResult:
    """Sum the loss over batches.

    Args:
      eval_step: from `make_eval_step`.
      params: the model's parameters.
      batches: of `fusedkv_jax.data.make_eval_batches`; each process gives its rows.
      mesh: what rows and tokens are split over; None where all is on one device.

    Raises:
      ValueError: there is no text to evaluate on.
    """
    loss_sum, num_tokens, num_bytes = 0.0, 0, 0
    for batch in batches:
        arrays = {name: batch[name] for name in BATCH_KEYS}
        loss, count = eval_step(params, arrays if mesh is None else put_batch(arrays, mesh))
        loss_sum += float(loss)
        num_tokens += int(count)
        num_bytes += batch["num_bytes"]
    if jax.process_count() > 1:
        # Not on devices, whose integers end at 2 GiB of text.
        total = processes.decide(int(num_bytes), sum)
        # Several processes may have fed the same rows.
        parts = jax.process_count() if mesh is None else process_rows(mesh)[1]
        num_bytes = total * parts // jax.process_count()
    if num_tokens == 0 or num_bytes == 0:  # documents without text still end
        raise ValueError(
            "the held-out text is empty; raise data.holdout_fraction or give more text"
        )
    return EvalResult(loss_sum, num_tokens, num_bytes)
