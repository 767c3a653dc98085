"""What callers may pass: each check names the argument, what it is and what it must be."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from pallas_kernels.paged_stream import PagedStream
from pallas_kernels.quantized import Quantized
from pallas_kernels.sources import Source
from pallas_kernels.stacked import Stacked

_Arguments = TypeVar("_Arguments")
_Result = TypeVar("_Result")


def sources(name: str, given: object) -> tuple[Source, ...]:
    """A tuple of float arrays, `Quantized`, `Stacked` or `PagedStream` of one shape."""
    if not isinstance(given, tuple | list) or not given:
        raise ValueError(f"{name} must be a non-empty tuple of [B, S, K, H] arrays")
    stored = (Quantized, Stacked, PagedStream)
    given = tuple(x if isinstance(x, stored) else jnp.asarray(x) for x in given)
    for index, source in enumerate(given):
        if isinstance(source, Quantized | Stacked):
            source.check_present(f"{name}[{index}]")
        if source.ndim != 4:
            raise ValueError(f"{name}[{index}] has shape {source.shape}; it must be [B, S, K, H]")
        if isinstance(source, stored):
            source.check(f"{name}[{index}]")
        elif not jnp.issubdtype(source.dtype, jnp.floating):
            raise ValueError(
                f"{name}[{index}] is {source.dtype}; it must be a float array or Quantized"
            )
        if source.shape != given[0].shape:
            raise ValueError(
                f"{name}[{index}] has shape {source.shape}; all {name} must have the shape of "
                f"{name}[0], {given[0].shape}"
            )
    return given


def fit(q: Array, keys: Sequence[Source], values: Sequence[Source]) -> None:
    """Queries, keys and values belong together."""
    batch, _, heads, size = keys[0].shape
    queries(q, (batch, heads, size), "keys")
    if values[0].shape[:3] != keys[0].shape[:3]:
        raise ValueError(
            f"values have shape {values[0].shape}; B, S, K must be those of keys, "
            f"{keys[0].shape[:3]}"
        )


def floats(name: str, given: object) -> None:
    """Refuses what is no array of floats."""
    dtype = getattr(given, "dtype", type(given).__name__)
    if not hasattr(given, "ndim") or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} is {dtype}; it must be a float array")


def flags(**given: object) -> None:
    """Refuses what is neither True nor False, such as a text."""
    for name, value in given.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name} is {value!r}; it must be True or False")


def queries(q: Array, shape: tuple[int, int, int], name: str) -> None:
    """Float queries [B, T, N, H] for keys of B, K, H = `shape` in the argument `name`."""
    floats("q", q)
    if q.ndim != 4 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q is {q.dtype} of shape {q.shape}; it must be a float [B, T, N, H]")
    batch, heads, size = shape
    if q.shape[0] != batch or q.shape[3] != size:
        raise ValueError(
            f"{name} have B = {batch} and H = {size}; they must be those of q, {q.shape[0]} and "
            f"{q.shape[3]}"
        )
    if q.shape[2] % heads:
        raise ValueError(
            f"q has {q.shape[2]} heads and {name} have {heads}; the second must divide the first"
        )


def weights(
    name: str, given: ArrayLike | None, sources_name: str, count: int, shape: tuple[int, ...]
) -> Array | None:
    """Float weights [J, K, H] for `count` sources of [K, H] = `shape`, or None for one source.

    One source with weights is a scaled source, which Lite with learnable weights trains.
    """
    expected = (count, *shape)
    if given is None:
        if count > 1:
            raise ValueError(
                f"{name} is None with {count} {sources_name}; several sources need weights of "
                f"shape {expected}"
            )
        return None
    if jnp.shape(given) != expected:
        none = ", or None" if count == 1 else ""
        raise ValueError(
            f"{name} has shape {jnp.shape(given)}; with {count} {sources_name} it must be "
            f"[J, K, H] = {expected}{none}"
        )
    given = jnp.asarray(given)
    if not jnp.issubdtype(given.dtype, jnp.floating):
        raise ValueError(f"{name} is {given.dtype}; it must be a float array")
    return given


@overload
def integers(name: str, array: None, shape: tuple[int, ...]) -> None: ...
@overload
def integers(name: str, array: ArrayLike, shape: tuple[int, ...]) -> Array: ...
def integers(name: str, array: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    """An int32 array of `shape`, or None."""
    if array is None:
        return None
    array = jnp.asarray(array)
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; it must be {shape}")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} is {array.dtype}; it must be an integer array")
    return array.astype(jnp.int32)


def lengths(array: ArrayLike | None, batch: int, most: int) -> Array | None:
    """int32 numbers of keys [B], 0 to `most` where they are known, or None."""
    array = integers("kv_lengths", array, (batch,))
    if array is None or isinstance(array, Tracer):
        return array
    known = np.asarray(array)
    outside = known[(known < 0) | (known > most)]
    if outside.size:
        raise ValueError(f"kv_lengths holds {outside[0]}; it must be from 0 to S = {most}")
    return array


def scores(window: int | None, softcap: float | None, scale: float | None = None) -> None:
    """The numbers that shape the scores."""
    number = isinstance(window, int | float | np.integer) and not isinstance(window, bool)
    if window is not None and not (number and 1 <= window < math.inf and window == int(window)):
        raise ValueError(
            f"window is {window}; it must be a whole number of at least 1, or None for no window"
        )
    if isinstance(scale, (int, float)) and not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be a finite number")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None for no cap")


def without_gradients(
    function: Callable[[_Arguments], _Result], reason: str, arguments: _Arguments
) -> _Result:
    """function(arguments); differentiating it raises NotImplementedError with the reason."""
    return _call(function, reason, arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _call(function: Callable[[_Arguments], _Result], reason: str, arguments: _Arguments) -> _Result:
    return function(arguments)


def _refuse(function: Callable, reason: str, arguments: object) -> NoReturn:
    raise NotImplementedError(reason)


_call.defvjp(_refuse, _refuse)
