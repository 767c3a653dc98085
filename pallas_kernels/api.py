"""`attention`: the operation's arguments and what they mean."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels import checks, choice
from pallas_kernels.call import AttentionCall
from pallas_kernels.masks import Mask
from pallas_kernels.paged_stream import PagedStream, is_paged
from pallas_kernels.quantized import Quantized, is_quantized
from pallas_kernels.sources import MixedSources
from pallas_kernels.stacked import Stacked


def implementations() -> tuple[str, ...]:
    """The names that `implementation` accepts besides "auto", kernels first."""
    return choice.names()


def attention(
    q: Float[Array, "B T N H"],
    keys: Sequence[Float[Array, "B S K H"] | Quantized | Stacked | PagedStream],
    values: Sequence[Float[Array, "B S K H2"] | Quantized | Stacked | PagedStream],
    key_weights: Float[Array, "J K H"] | None = None,
    value_weights: Float[Array, "J2 K H2"] | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    kv_lengths: Int[Array, "B"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_residuals: bool = False,
    implementation: str = "auto",
) -> Any:
    """Attention over keys and values that are mixed from several caches while they are read.

    With K^ = sum_j key_weights[j] * keys[j] and V^ = sum_j value_weights[j] * values[j]
    (FusedKV, the reconstruction of the upper layers), the result is softmax(scale q K^T) V^.
    One source without weights is plain attention. Mixing, softmax and sums are in float32.

    A key is visible to a query if it is present, not after the query (`causal`), less than
    `window` positions before it, and in the same segment. A query that sees nothing gives
    zero, lse -inf and no gradient. Absent keys and values may hold anything, NaN included.

    Args:
      q: queries. Query head n reads KV head n // (N // K).
      keys: J sources of the keys, already rotated; floats, or for decoding `Quantized`, or
        `Stacked` or `PagedStream`: streams of a cache that are read where they lie. A source
        wider than q is rounded to q's type where it is multiplied, and gets its gradient in its
        own type: widen a source that many layers read to float32, and their sum is exact.
      values: J' sources of the values; their head size H' may differ from H.
      key_weights: float32 weights of the key sources. One source needs none, and takes [1, K, H]
        where it is scaled (one learned source); several need them.
      value_weights: float32 weights of the value sources, alike.
      causal: hide the keys after the query's position.
      window: number of positions that a query sees, its own included; None for all.
      q_positions: int32 positions; by default kv_lengths - T + t (S - T + t without lengths).
      kv_positions: int32 positions, negative = absent; by default the key's index.
      q_segment_ids: int32, with `kv_segment_ids` or not at all; negative = padding, which sees
        nothing and is seen by nothing.
      kv_segment_ids: the same of the keys.
      kv_lengths: int32 number of leading keys that are present in each row.
      scale: factor of the scores, H**-0.5 by default.
      softcap: scores become softcap * tanh(score / softcap).
      return_residuals: also return the log-sum-exp of the scores, differentiable.
      implementation: "auto", or one of `implementations()`; `choice.TABLE` is what
        "auto" goes by.

    Returns:
      The output [B, T, N, H'] in the dtype of q; with `return_residuals` the pair of it and
      the natural logarithm of the softmax denominator, [B, T, N] in float32.

    Raises:
      ValueError: an argument has a wrong shape or value; the message names it.
      NotImplementedError: the named implementation cannot serve this call or this device, or
        a call with a `Quantized` or paged source is differentiated.
    """
    keys, values = checks.sources("keys", keys), checks.sources("values", values)
    checks.fit(q, keys, values)
    checks.scores(window, softcap, scale)
    checks.flags(causal=causal, return_residuals=return_residuals)
    if (q_segment_ids is None) != (kv_segment_ids is None):
        missing = "q_segment_ids" if q_segment_ids is None else "kv_segment_ids"
        raise ValueError(f"{missing} is None; give segment ids for queries and keys, or neither")
    batch, length = keys[0].shape[:2]
    queries = (batch, q.shape[1])
    mask = Mask(
        causal=bool(causal),
        window=None if window is None else int(window),
        q_positions=checks.integers("q_positions", q_positions, queries),
        kv_positions=checks.integers("kv_positions", kv_positions, (batch, length)),
        q_segment_ids=checks.integers("q_segment_ids", q_segment_ids, queries),
        kv_segment_ids=checks.integers("kv_segment_ids", kv_segment_ids, (batch, length)),
        kv_lengths=checks.lengths(kv_lengths, batch, length),
    )
    weights = (
        checks.weights("key_weights", key_weights, "keys", len(keys), keys[0].shape[2:]),
        checks.weights("value_weights", value_weights, "values", len(values), values[0].shape[2:]),
    )
    call = AttentionCall(
        q=q,
        sources=MixedSources(keys, values, *weights),
        mask=mask,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
    )

    def run(call: AttentionCall) -> tuple[Array, Array | None]:
        return choice.run(implementation, call)

    if is_paged((*keys, *values)):
        reason = "pages cannot be differentiated; train with keys and values of whole sequences"
        out, lse = checks.without_gradients(run, reason, call)
    elif is_quantized((*keys, *values)):
        reason = "a Quantized source cannot be differentiated; train with float keys and values"
        out, lse = checks.without_gradients(run, reason, call)
    else:
        out, lse = run(call)
    if return_residuals and lse is None:
        raise NotImplementedError(f"implementation {implementation!r} returns no residuals")
    return (out, lse) if return_residuals else out
