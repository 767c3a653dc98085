"""`paged_attention`: the operation over a cache in pages."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from pallas_kernels import checks, choice
from pallas_kernels.call import PagedAttentionCall
from pallas_kernels.pages import Pages


def paged_attention(
    q: Float[Array, "B T N H"],
    pages: Pages,
    page_table: Int[Array, "B max_pages"],
    kv_lengths: Int[Array, "B"],
    key_weights: Float[Array, "J K H"] | None = None,
    value_weights: Float[Array, "J2 K H2"] | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_residuals: bool = False,
    implementation: str = "auto",
) -> Any:
    """Causal attention of each row's last T tokens over its tokens in pages.

    Token i of row b sits in slot i % page_size of page `page_table[b, i // page_size]`. What no
    token reaches, pages, slots and entries of the table, may hold anything, NaN included.
    There are no gradients. Arguments that are not explained here are those of `attention`.

    Args:
      q: queries, at positions kv_lengths - T to kv_lengths - 1.
      pages: the cache.
      page_table: int32 pages of each row.
      kv_lengths: int32 tokens of each row, those of the queries included; 0 gives zeros.

    Returns:
      The output [B, T, N, H'], with `return_residuals` also the lse [B, T, N], as `attention`.

    Raises:
      ValueError: an argument has a wrong shape or value, or a table that is not traced points
        to no page; the message names it.
      NotImplementedError: differentiated, or the implementation cannot serve the call.
    """
    table, lengths = _check(q, pages, page_table, kv_lengths)
    checks.scores(window, softcap, scale)
    heads = pages.num_kv_heads
    weights = (
        checks.weights("key_weights", key_weights, "keys", pages.num_keys, (heads, pages.key_size)),
        checks.weights(
            "value_weights", value_weights, "values", pages.num_values, (heads, pages.value_size)
        ),
    )
    call = PagedAttentionCall(
        q=q,
        pages=pages,
        page_table=table,
        kv_lengths=lengths,
        key_weights=weights[0],
        value_weights=weights[1],
        window=None if window is None else int(window),
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
    )
    reason = "pages cannot be differentiated; train with `attention` over whole sequences"
    out, lse = checks.without_gradients(lambda x: choice.run(implementation, x), reason, call)
    return (out, lse) if return_residuals else out


def _check(q: Array, pages: Pages, page_table: Array, kv_lengths: Array) -> tuple[Array, Array]:
    """The table, clipped to pages that exist, and the lengths, both int32."""
    if not isinstance(pages, Pages):
        raise ValueError(f"pages is a {type(pages).__name__}; it must be a Pages")
    pages.check()
    checks.floats("q", q)
    checks.queries(q, (q.shape[0], pages.num_kv_heads, pages.key_size), "pages")
    batch, size = q.shape[0], pages.page_size
    if jnp.ndim(page_table) != 2 or page_table.shape[0] != batch:
        raise ValueError(f"page_table has shape {jnp.shape(page_table)}; it must be [B, max_pages]")
    page_table = checks.integers("page_table", page_table, (batch, page_table.shape[1]))
    kv_lengths = checks.integers("kv_lengths", kv_lengths, (batch,))
    held = page_table.shape[1] * size
    if not isinstance(kv_lengths, Tracer):
        lengths = np.asarray(kv_lengths)
        if lengths.size and not (0 <= lengths.min() and lengths.max() <= held):
            raise ValueError(
                f"kv_lengths reach from {lengths.min()} to {lengths.max()}; page_table has room "
                f"for 0 to {held} tokens ({page_table.shape[1]} pages of {size})"
            )
        if not isinstance(page_table, Tracer):
            used = np.arange(page_table.shape[1]) < -(-lengths[:, None] // size)
            found = np.where(used, np.asarray(page_table), 0)
            if found.size and not (0 <= found.min() and found.max() < pages.num_pages):
                bad = found[(found < 0) | (found >= pages.num_pages)][0]
                raise ValueError(
                    f"page_table points to page {bad}; pages has 0 to {pages.num_pages - 1}"
                )
    # Kernels copy by these numbers, also where they are traced: none may leave the pages.
    return jnp.clip(page_table, 0, pages.num_pages - 1), kv_lengths
