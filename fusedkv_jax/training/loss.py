"""Cross-entropy of next tokens, computed in chunks so that the logits are never whole."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from fusedkv_jax.sharding import AXES, active_mesh, spec
from fusedkv_jax.trees import Leaf
from pallas_kernels import choice

Sums = tuple[jax.Array, jax.Array]  # of the losses, and of the targets that count
Batch = dict[str, Leaf]  # of [B, T] arrays: NumPy from the data pipeline, or traced
Loss = Callable[[nnx.GraphDef, nnx.State, Batch], Sums]
# From the number of the step, its batch, and constants that it is given.
Objective = Callable[..., tuple[Batch, Loss]]


LOGITS_MIB = 512  # of float32 logits at a time, on accelerators
# The logits of a chunk are written and read several times, which a CPU's caches make cheap: 512
# tokens took 0.52 to 1.02 times as long as 1,024 to 4,096 at once (4,096 to 49,152 words, widths 80
# to 576, an EPYC). Fewer read the head's gradient too often; below 4 MiB nothing is gained.
_CPU_TOKENS, _CPU_LOGITS = 512, 2**20


def logits_at_a_time(logits_mib: float | None, vocabulary: int) -> int:
    """How many float32 logits a device holds at a time.

    Args:
      logits_mib: so many MiB; None for 512 MiB, or on a CPU for those of 512 tokens, but at least
        4 MiB.
      vocabulary: logits of a token.
    """
    if logits_mib is None and choice.device()[0] == "cpu":
        return max(_CPU_TOKENS * vocabulary, _CPU_LOGITS)
    return max(1, int((logits_mib or LOGITS_MIB) * 2**20) // 4)


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


def batch_loss(
    graphdef: nnx.GraphDef, params: nnx.State, batch: Batch, logits_mib: float | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed cross-entropy of a batch under the model (graphdef, params), and the targets counted.

    Args:
      graphdef: the model's structure.
      params: its parameters.
      batch: [B, T] arrays as `fusedkv_jax.data` gives them.
      logits_mib: as for `head_cross_entropy`.
    """
    model = nnx.merge(graphdef, params)
    x = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"])
    targets, mask = batch["targets"], batch["loss_mask"]
    cap = model.config.logit_softcap
    return head_cross_entropy(x, model.head_matrix, targets, mask, logits_mib, cap)


def head_cross_entropy(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    mask: Array,
    logits_mib: float | None = None,
    softcap: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`sum_cross_entropy` of `x @ head`, whose logits [B, T, V] are never whole.

    Tokens are taken in chunks. Where gradients are wanted the forward pass computes them, chunk by
    chunk, so nothing is computed twice and only gradients of the size of `x` and `head` are kept.
    On a mesh each device has its tokens and its part of the vocabulary, and the gradient of
    `head` is reduced once, after its last chunk.

    Args:
      x: final hidden states; their type is that of the products, which sum in float32.
      head: output matrix; it is cast to the type of `x`, its gradient has its own type.
      targets: as for `sum_cross_entropy`.
      mask: likewise.
      logits_mib: MiB of float32 logits that a device holds at a time; see `logits_at_a_time`.
      softcap: logits y become softcap * tanh(y / softcap) before the softmax.

    Returns:
      (sum of the losses, number of targets counted), both float32.
    """
    counted = mask != 0
    mesh = active_mesh()
    limit = logits_at_a_time(logits_mib, head.shape[1])
    if mesh is None:
        total = _local(x, head, targets, counted, _Split((), None, 1, limit, softcap))[0]
        return total, counted.sum(dtype=jnp.float32)
    rows = spec(("batch", "sequence"), targets.shape, mesh)
    matrix = spec(("width", "vocabulary"), head.shape, mesh)
    split = [name for part in (*rows, matrix[1]) for name in _names(part)]
    repeats = math.prod(mesh.shape[name] for name in AXES if name not in split)
    plan = _Split(_names(matrix[0]), matrix[1], repeats, limit, softcap)
    run = jax.shard_map(
        functools.partial(_local, plan=plan),
        mesh=mesh,
        in_specs=(jax.P(*rows, None), matrix, rows, rows),
        out_specs=jax.P(AXES),
        check_vma=False,
    )
    return run(x, head, targets, counted).sum(), counted.sum(dtype=jnp.float32)


class _Split(NamedTuple):
    """How one device's part of the computation fits into the whole.

    Attributes:
      gathered: mesh axes that split the rows of the head.
      vocabulary: mesh axis that splits its columns, or None.
      repeats: devices that compute the same; each contributes that fraction.
      limit: logits at a time.
      softcap: of the logits, or None.
    """

    gathered: tuple[str, ...]
    vocabulary: str | None
    repeats: int
    limit: int
    softcap: float | None = None


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _local(x: Array, head: Array, targets: Array, counted: Array, plan: _Split) -> Array:
    """This device's contribution to the sum, [1]."""
    tokens = (targets.reshape(-1), counted.reshape(-1))
    return jnp.reshape(_sum_losses(x.reshape(-1, x.shape[-1]), head, *tokens, plan), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sum_losses(x: Array, head: Array, targets: Array, counted: Array, plan: _Split) -> Array:
    weight = _gathered(head.astype(x.dtype), plan)

    def one_chunk(total: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
        chunk, targets, counted = part
        return total + _chunk_loss(chunk, weight, targets, counted, plan)[0], None

    parts = _chunks((x, targets, counted), weight.shape[1], plan)
    return _share(jax.lax.scan(one_chunk, jnp.float32(0), parts)[0], plan)


def _forward(
    x: Array, head: Array, targets: Array, counted: Array, plan: _Split
) -> tuple[Array, tuple[Array, Array]]:
    weight = _gathered(head.astype(x.dtype), plan)

    def one_chunk(
        carry: tuple[Array, Array], part: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], Array]:
        total, dhead = carry
        chunk, targets, counted = part
        loss, dlogits = _chunk_loss(chunk, weight, targets, counted, plan)
        # Here, where the logits are: the backward pass would have to compute them again.
        dx = _dot(dlogits, weight, 1, 1) / plan.repeats
        return (total + loss, dhead + _dot(chunk, dlogits, 0, 0)), dx.astype(x.dtype)

    parts = _chunks((x, targets, counted), weight.shape[1], plan)
    start = (jnp.float32(0), jnp.zeros(weight.shape, jnp.float32))
    (total, dhead), dx = jax.lax.scan(one_chunk, start, parts)
    dhead = (dhead / plan.repeats).astype(head.dtype)
    if plan.gathered:  # once, not for each chunk: the sum is as large as the head
        dhead = jax.lax.psum_scatter(dhead, plan.gathered, scatter_dimension=0, tiled=True)
    return _share(total, plan), (dx.reshape(-1, x.shape[1])[: x.shape[0]], dhead)


def _backward(
    plan: _Split, gradients: tuple[Array, Array], ct: Array
) -> tuple[Array, Array, None, None]:
    dx, dhead = gradients
    return (dx * ct).astype(dx.dtype), (dhead * ct).astype(dhead.dtype), None, None


_sum_losses.defvjp(_forward, _backward)


def _gathered(weight: Array, plan: _Split) -> Array:
    if not plan.gathered:
        return weight
    return jax.lax.all_gather(weight, plan.gathered, axis=0, tiled=True)


def _share(total: Array, plan: _Split) -> Array:
    """Devices that split a vocabulary know the same sum; what they add up to is the sum."""
    parts = 1 if plan.vocabulary is None else jax.lax.axis_size(plan.vocabulary)
    return total / (plan.repeats * parts)


def _chunks(arrays: Sequence[Array], vocabulary: int, plan: _Split) -> tuple[Array, ...]:
    """[n, ...] arrays as [chunks, n / chunks, ...], padded with zeros: tokens that do not count."""
    n = arrays[0].shape[0]
    size = -(-n // -(-n * vocabulary // plan.limit))
    count = -(-n // size)

    def split(array: Array) -> Array:
        padded = jnp.pad(array, ((0, count * size - n), *((0, 0),) * (array.ndim - 1)))
        return padded.reshape(count, size, *array.shape[1:])

    return tuple(split(array) for array in arrays)


def _chunk_loss(
    x: Array, weight: Array, targets: Array, counted: Array, plan: _Split
) -> tuple[Array, Array]:
    """Summed loss of some tokens [n, D], and its derivative by their logits [n, V]."""
    logits = _dot(x, weight, 1, 0)  # V of this device
    slope = None
    if plan.softcap is not None:
        bent = jnp.tanh(logits / plan.softcap)
        logits, slope = plan.softcap * bent, 1 - bent**2
    place = targets
    over_vocabulary = lambda value, combine: value  # noqa: E731
    if plan.vocabulary is not None:
        place = targets - jax.lax.axis_index(plan.vocabulary) * weight.shape[1]
        over_vocabulary = lambda value, combine: combine(value, plan.vocabulary)  # noqa: E731
    top = over_vocabulary(logits.max(1), jax.lax.pmax)
    exponentials = jnp.exp(logits - top[:, None])
    total = over_vocabulary(exponentials.sum(1), jax.lax.psum)
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == place[:, None]
    chosen = over_vocabulary(jnp.where(hit, logits, 0.0).sum(1), jax.lax.psum)
    # where, not a product: an infinite loss at a padding place must not become NaN.
    loss = jnp.where(counted, jnp.log(total) + top - chosen, 0.0).sum()
    derivative = jnp.where(counted[:, None], exponentials / total[:, None] - hit, 0.0)
    if slope is not None:
        derivative = derivative * slope
    return loss, derivative.astype(x.dtype)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    dims = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
