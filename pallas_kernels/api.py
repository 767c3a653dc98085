"""`attention`: the arguments, their checks, and the choice of an implementation."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import reference, xla
from pallas_kernels.masks import Mask

# Every backend: (q, keys, values, key_weights, value_weights, mask, *, scale, softcap) ->
# (out, lse), on arguments that `attention` has checked. One that cannot serve a call, or the
# device, raises NotImplementedError; "auto" then tries the next, in this order.
_IMPLEMENTATIONS: dict[str, Callable] = {
    "xla": xla.attention,
    "reference": reference.attention,
}


def implementations() -> tuple[str, ...]:
    """The names that `implementation` accepts besides "auto", preferred ones first."""
    return tuple(_IMPLEMENTATIONS)


def attention(
    q: Float[Array, "B T N H"],
    keys: Sequence[Float[Array, "B S K H"]],
    values: Sequence[Float[Array, "B S K H2"]],
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
      keys: J sources of the keys, already rotated.
      values: J' sources of the values; their head size H' may differ from H.
      key_weights: float32 weights of the key sources; None with exactly one source.
      value_weights: float32 weights of the value sources; None with exactly one source.
      causal: hide the keys after the query's position.
      window: number of positions that a query sees, its own included; None for all.
      q_positions: int32 positions; by default kv_lengths - T + t (S - T + t without lengths).
      kv_positions: int32 positions, negative = absent; by default the key's index.
      q_segment_ids, kv_segment_ids: int32, both or neither; negative = padding, which sees
        nothing and is seen by nothing.
      kv_lengths: int32 number of leading keys that are present in each row.
      scale: factor of the scores, H**-0.5 by default.
      softcap: scores become softcap * tanh(score / softcap).
      return_residuals: also return the log-sum-exp of the scores, differentiable.
      implementation: "auto", or one of `implementations()`.

    Returns:
      The output [B, T, N, H'] in the dtype of q; with `return_residuals` the pair of it and
      the natural logarithm of the softmax denominator, [B, T, N] in float32.

    Raises:
      ValueError: an argument has a wrong shape or value; the message names it.
      NotImplementedError: the named implementation cannot serve this call or this device.
    """
    keys, values = _sources("keys", keys), _sources("values", values)
    _check_arrays(q, keys, values)
    key_weights = _weights("key_weights", key_weights, "keys", keys)
    value_weights = _weights("value_weights", value_weights, "values", values)
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1, or None for no window")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None for no cap")
    if (q_segment_ids is None) != (kv_segment_ids is None):
        missing = "q_segment_ids" if q_segment_ids is None else "kv_segment_ids"
        raise ValueError(f"{missing} is None; give segment ids for queries and keys, or neither")
    batch, length = keys[0].shape[:2]
    queries = (batch, q.shape[1])
    mask = Mask(
        causal=bool(causal),
        window=None if window is None else int(window),
        q_positions=_integers("q_positions", q_positions, queries),
        kv_positions=_integers("kv_positions", kv_positions, (batch, length)),
        q_segment_ids=_integers("q_segment_ids", q_segment_ids, queries),
        kv_segment_ids=_integers("kv_segment_ids", kv_segment_ids, (batch, length)),
        kv_lengths=_integers("kv_lengths", kv_lengths, (batch,)),
    )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    arguments = (q, keys, values, key_weights, value_weights, mask)
    out, lse = _run(implementation, arguments, {"scale": scale, "softcap": softcap})
    return (out, lse) if return_residuals else out


def _run(implementation: str, arguments, options):
    """Calls the named implementation, or the first that serves the call."""
    if implementation != "auto":
        if implementation not in _IMPLEMENTATIONS:
            known = ("auto", *_IMPLEMENTATIONS)
            near = difflib.get_close_matches(str(implementation), known, n=2, cutoff=0.4)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(
                f"implementation is {implementation!r}; it must be one of {', '.join(known)}{hint}"
            )
        return _IMPLEMENTATIONS[implementation](*arguments, **options)
    refusals = []
    for name, function in _IMPLEMENTATIONS.items():
        try:
            return function(*arguments, **options)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    raise NotImplementedError("no implementation serves this call; " + "; ".join(refusals))


def _sources(name, sources):
    if hasattr(sources, "shape") or not len(sources):
        raise ValueError(f"{name} must be a non-empty tuple of [B, S, K, H] arrays")
    sources = tuple(jnp.asarray(x) for x in sources)
    for index, source in enumerate(sources):
        if source.ndim != 4:
            raise ValueError(f"{name}[{index}] has shape {source.shape}; it must be [B, S, K, H]")
        if not jnp.issubdtype(source.dtype, jnp.floating):
            raise ValueError(f"{name}[{index}] is {source.dtype}; it must be a float array")
        if source.shape != sources[0].shape:
            raise ValueError(
                f"{name}[{index}] has shape {source.shape}; all {name} must have the shape of "
                f"{name}[0], {sources[0].shape}"
            )
    return sources


def _check_arrays(q, keys, values):
    if q.ndim != 4 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q is {q.dtype} of shape {q.shape}; it must be a float [B, T, N, H]")
    key_shape, value_shape = keys[0].shape, values[0].shape
    if q.shape[0] != key_shape[0] or q.shape[3] != key_shape[3]:
        raise ValueError(
            f"keys have shape {key_shape}; B and H must be those of q, {q.shape[0]} and "
            f"{q.shape[3]}"
        )
    if q.shape[2] % key_shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads and keys have {key_shape[2]}; the second must divide "
            "the first"
        )
    if value_shape[:3] != key_shape[:3]:
        raise ValueError(
            f"values have shape {value_shape}; B, S, K must be those of keys, {key_shape[:3]}"
        )


def _weights(name, weights, sources_name, sources):
    if weights is None:
        if len(sources) > 1:
            raise ValueError(
                f"{name} is None with {len(sources)} {sources_name}; several sources need "
                f"weights of shape {(len(sources), *sources[0].shape[2:])}"
            )
        return None
    expected = (len(sources), *sources[0].shape[2:])
    if jnp.shape(weights) != expected:
        raise ValueError(
            f"{name} has shape {jnp.shape(weights)}; with these {sources_name} it must be "
            f"[J, K, H] = {expected}"
        )
    weights = jnp.asarray(weights)
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(f"{name} is {weights.dtype}; it must be a float array")
    return weights


def _integers(name, array, shape):
    if array is None:
        return None
    array = jnp.asarray(array)
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; it must be {shape}")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} is {array.dtype}; it must be an integer array")
    return array.astype(jnp.int32)
