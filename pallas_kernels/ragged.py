"""`ragged_attention`: the operation for a step that mixes chunks of prompts and single tokens."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from pallas_kernels import checks, choice
from pallas_kernels.call import RaggedAttentionCall
from pallas_kernels.paged_stream import PagedStream
from pallas_kernels.ragged_rows import RaggedRows
from pallas_kernels.sources import MixedSources


def ragged_attention(
    q: Float[Array, "T N H"],
    keys: Sequence[PagedStream],
    values: Sequence[PagedStream],
    rows: RaggedRows,
    key_weights: Float[Array, "J K H"] | None = None,
    value_weights: Float[Array, "J2 K H2"] | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_residuals: bool = False,
    implementation: str = "auto",
) -> Any:
    """Causal attention of queries of many rows over the pages of each, in one call.

    A serving step computes chunks of some prompts and the next token of other requests: their
    queries lie side by side, and a kernel reads the pages of each row once for a block of its
    queries. Arguments that are not explained here are those of `attention`; there are no gradients.

    Args:
      q: queries of all rows.
      keys: J streams in pages, all with one table of R rows. Its entries that no token of a row
        reaches, and what such pages and places hold, may be anything, NaN included.
      values: J' streams, with the same table.
      rows: which queries are whose.

    Returns:
      The output [T, N, H'], with `return_residuals` also the lse [T, N], as `attention`; zero and
      -inf for queries that see nothing or belong to no row.

    Raises:
      ValueError: an argument has a wrong shape or value; the message names it.
      NotImplementedError: differentiated, or the implementation cannot serve the call.
    """
    keys, values = _streams("keys", keys), _streams("values", values)
    if values[0].shape[:3] != keys[0].shape[:3]:
        raise ValueError(
            f"values have shape {values[0].shape}; R, S, K must be those of keys, "
            f"{keys[0].shape[:3]}"
        )
    _check_tables((*keys, *values))
    checks.floats("q", q)
    if q.ndim != 3:
        raise ValueError(f"q has shape {q.shape}; it must be [T, N, H]")
    num_rows, _, heads, size = keys[0].shape
    checks.queries(q[None], (1, heads, size), "keys")
    checks.scores(window, softcap, scale)
    checks.flags(return_residuals=return_residuals)
    weights = (
        checks.weights("key_weights", key_weights, "keys", len(keys), keys[0].shape[2:]),
        checks.weights("value_weights", value_weights, "values", len(values), values[0].shape[2:]),
    )
    call = RaggedAttentionCall(
        q=q,
        sources=MixedSources(keys, values, *weights),
        rows=_checked(rows, q.shape[0], keys[0].shape[:2]),
        window=None if window is None else int(window),
        scale=size**-0.5 if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        residuals=bool(return_residuals),
    )
    reason = "pages cannot be differentiated; train with `attention` over whole sequences"
    out, lse = checks.without_gradients(lambda x: choice.run(implementation, x), reason, call)
    return (out, lse) if return_residuals else out


def _streams(name: str, given: object) -> tuple[PagedStream, ...]:
    found = checks.sources(name, given)
    paged = tuple(x for x in found if isinstance(x, PagedStream))
    if len(paged) < len(found):
        raise ValueError(f"{name} are not all PagedStream; other sources are for `attention`")
    return paged


def _check_tables(streams: Sequence[PagedStream]) -> None:
    """Refuses several tables, where they are known."""
    tables = [x.table for x in streams]
    if any(isinstance(x, Tracer) for x in tables):
        return
    if not all(np.array_equal(x, tables[0]) for x in tables[1:]):
        raise ValueError("keys and values have different tables; a row has its pages in one")


def _checked(rows: RaggedRows, total: int, held: tuple[int, ...]) -> RaggedRows:
    """The rows in int32; refuses numbers that do not fit, where they are known."""
    if not isinstance(rows, RaggedRows):
        raise ValueError(f"rows is a {type(rows).__name__}; it must be a RaggedRows")
    num_rows, capacity = held
    arrays = {
        name: checks.integers(f"rows.{name}", getattr(rows, name), (num_rows,))
        for name in ("starts", "counts", "lengths")
    }
    places = sum(lane * columns for lane, columns in rows.lanes)
    if rows.lanes and (sum(lane for lane, _ in rows.lanes), places) != (num_rows, total):
        raise ValueError(
            f"rows.lanes is {rows.lanes}; it must have {num_rows} rows and {total} places in all"
        )
    if not any(isinstance(x, Tracer) for x in arrays.values()):
        starts, counts, lengths = (np.asarray(x) for x in arrays.values())
        used = counts > 0
        if counts.size and counts.min() < 0:
            raise ValueError(f"rows.counts holds {counts.min()}; it must be 0 or more")
        outside = used & ((starts < 0) | (starts + counts > total))
        if outside.any():
            row = outside.argmax()
            raise ValueError(
                f"row {row} has places {starts[row]} to {starts[row] + counts[row] - 1}; q has 0 "
                f"to {total - 1}"
            )
        if (used & (lengths > capacity)).any():
            raise ValueError(
                f"rows.lengths holds {lengths[used].max()}; a table has room for {capacity} tokens"
            )
        order = np.argsort(starts[used])
        ends = (starts + counts)[used][order]
        if (ends[:-1] > starts[used][order][1:]).any():
            raise ValueError("rows.starts and rows.counts give two rows the same place")
    wide = {name: jnp.asarray(x) for name, x in arrays.items()}
    return RaggedRows(**wide, lanes=rows.lanes)
