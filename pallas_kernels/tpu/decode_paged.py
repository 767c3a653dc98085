"""Decoding from pages, in which one copy brings the records of all heads.

In the loop of `decode_kernel` a block is some pages of a row:

    copy     page by page, where the row's table says; pages that begin after its end are left out
    scores   of each KV head: queries at the keys' lanes of a record, zeros at the others, times
             the records; all keys in one product, or in 8 bits each in its own
    outputs  p times the values' lanes; where lanes do not allow that, times whole records
    clear    tokens after the row's end
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import linear, masks
from pallas_kernels.call import PagedAttentionCall
from pallas_kernels.masks import Mask
from pallas_kernels.sources import Result
from pallas_kernels.tpu import chips, decode
from pallas_kernels.tpu import decode_inputs as inputs
from pallas_kernels.tpu import steps as steps_lib
from pallas_kernels.tpu.blocks import LANES, round_up
from pallas_kernels.tpu.decode import Cache
from pallas_kernels.tpu.decode_kernel import CacheReader, Memory, Method, Term
from pallas_kernels.tpu.how import How

Spans = Sequence[tuple[int, int]]  # start and stop of each stream in a record


def _paged_copy(
    method: Method,
    row: Array,
    block: Array,
    slot: int | Array,
    memory: Memory,
    *,
    pages: int,
    width: int,
    size: int,
) -> None:
    (stored,), (buffer,) = memory.stored, memory.buffers

    def page(index: Array, _: None) -> None:
        number = block * pages + index

        @pl.when(number * size < memory.ends[row])
        def _() -> None:
            source = stored.at[memory.table[row * width + number]]
            target = buffer.at[slot, index]
            getattr(pltpu.make_async_copy(source, target, memory.sems.at[slot]), method)()

    jax.lax.fori_loop(0, pages, page, None)


def _paged_read(
    buffer: Ref, slot: int | Array, head: int | Array, start: int, size: int, term: Term
) -> Array:
    del start
    part = buffer[slot, :, head, :, pl.ds(term.start, term.width)]
    return part.reshape(size, term.width)


def _paged_clear(
    row: Array,
    block: Array,
    slot: int | Array,
    positions: Ref,
    memory: Memory,
    *,
    pages: int,
    size: int,
) -> None:
    del positions
    (buffer,) = memory.buffers

    def page(index: Array, _: None) -> None:
        first = (block * pages + index) * size
        token = first + jax.lax.broadcasted_iota(jnp.int32, (1, size, 1), 1)
        old = buffer[slot, index]
        buffer[slot, index] = jnp.where(token < memory.ends[row], old, jnp.zeros_like(old))

    jax.lax.fori_loop(0, pages, page, None)


def paged(how: How, call: PagedAttentionCall) -> Result:
    """(out, lse) of each row's last T tokens over its pages.

    However many they are: each part of the queries that one product takes reads the pages anew.
    """
    pages, mask = call.pages, call.mask
    chips.check_storage(how.chip, pages.data.dtype)
    inputs.check_lanes([pages.data.shape[3]], "records", how)

    def run(q: Array, mask: Mask) -> Result:
        return _blocks(how, call, q, mask)

    held = call.page_table.shape[1] * pages.page_size
    step = inputs.tokens_at_once(call.q.shape[2] // pages.num_kv_heads)
    return inputs.in_parts(run, call.q, mask, held, step)


def _blocks(how: How, call: PagedAttentionCall, q: Array, mask: Mask) -> Result:
    """The kernel for some of the queries."""
    pages, page_table, kv_lengths = call.pages, call.page_table, call.kv_lengths
    batch, length, num, size = q.shape
    heads, page_size, record = pages.data.shape[1:]
    group, width = num // heads, page_table.shape[1]
    q_positions = jnp.asarray(masks.query_positions(mask, length, width * page_size))
    page_bytes = heads * page_size * record * pages.data.dtype.itemsize
    count = max(1, min(width, inputs.BLOCK_BYTES // page_bytes))
    need = LANES // np.gcd(LANES, page_size)  # a block's tokens fill whole lanes
    count = round_up(count, int(need))
    tokens = count * page_size
    total = round_up(width, count) * page_size

    rule = Mask(causal=True, window=call.window)
    # A length beyond the table, where it is traced, must not lead into the next row's entries.
    kv_lengths = jnp.minimum(kv_lengths, width * page_size)
    index = jnp.arange(total)[None]
    k_positions = jnp.where(index < kv_lengths[:, None], index, steps_lib.FAR).astype(jnp.int32)
    visited = inputs.StepPlaces(q_positions, k_positions, None, None).visited(rule, tokens)
    spans = pages.spans()
    keys, values = spans[: pages.num_keys], spans[pages.num_keys :]
    scales = None
    if pages.scales is not None:
        # [B, pages, K, page_size, terms] to rows of tokens; a few bytes for each record.
        scales = pages.scales.swapaxes(2, 3)[page_table].transpose(0, 2, 3, 1, 4)
        scales = scales.reshape(batch, heads, len(spans), width * page_size)
        scales = jnp.pad(scales, ((0, 0),) * 3 + ((0, total - width * page_size),))
        scales = jnp.where(k_positions[:, None, None] < steps_lib.FAR, scales, 0.0)

    # A product with a part of the record where lanes allow, else with all of it: zeros in the
    # queries hide the other streams, and their outputs are dropped.
    separate = scales is not None
    scores, score_cuts = _terms(keys, record, separate)
    outputs, output_cuts = _terms(values, record, separate)
    queries = linear.fold_queries(q, call.key_weights, how.query_factor)  # [B, J, T, N, H]
    queries = _place(queries, keys, scores, separate)
    queries = queries.reshape(batch, len(scores), length, heads, group, -1)
    queries = queries.transpose(0, 3, 1, 4, 2, 5).reshape(
        batch, heads, len(scores), group * length, -1
    )
    pad = inputs.padded_rows(group * length) - group * length
    queries = jnp.pad(queries, ((0, 0),) * 3 + ((0, pad), (0, 0))).astype(q.dtype)
    arrays = {
        "q_positions": jnp.pad(
            jnp.tile(q_positions, (1, group)), ((0, 0), (0, pad)), constant_values=-steps_lib.FAR
        ),
        "k_positions": k_positions[:, None],
        "scales": scales,
    }
    form = CacheReader(
        heads=heads,
        rows=tokens,
        chunk=tokens,
        scores=scores,
        outputs=outputs,
        buffers=((count, heads, page_size, record),),
        copy=functools.partial(_paged_copy, pages=count, width=width, size=page_size),
        read=_paged_read,
        clear=functools.partial(_paged_clear, pages=count, size=page_size),
    )
    cache = Cache([pages.data], visited, page_table.reshape(-1), kv_lengths)
    out, lse = decode.run(how, rule, form, queries, cache, arrays)
    unstacked = lambda x: x.reshape(*x.shape[:-2], group, length, x.shape[-1])  # noqa: E731
    out = unstacked(out[:, :, :, : group * length])  # [B, K, terms, G, T, width]
    out = out.transpose(0, 2, 4, 1, 3, 5).reshape(batch, len(outputs), length, num, -1)
    parts = [
        out[:, min(j, len(outputs) - 1), ..., stop - pages.value_size : stop]
        for j, stop in enumerate(output_cuts)
    ]
    out = linear.fold_outputs(jnp.stack(parts, axis=1), call.value_weights).astype(q.dtype)
    lse = unstacked(lse[:, :, : group * length, None])[..., 0].transpose(0, 3, 1, 2)
    return out, lse.reshape(batch, length, num)


def _terms(spans: Spans, record: int, separate: bool) -> tuple[tuple[Term, ...], list[int]]:
    """The products of one side, and where each stream ends in the product that has it."""
    first, last = spans[0][0], spans[-1][1]
    aligned = all(x % LANES == 0 for span in spans for x in span)
    if separate:
        cuts = spans if aligned else [(0, record)] * len(spans)
        ends = [stop - cut[0] for (_, stop), cut in zip(spans, cuts, strict=True)]
        return tuple(Term(0, a, b - a) for a, b in cuts), ends
    start, stop = (first, last) if first % LANES == 0 and last % LANES == 0 else (0, record)
    return (Term(0, start, stop - start),), [x - start for _, x in spans]


def _place(queries: Array, spans: Spans, terms: Sequence[Term], separate: bool) -> Array:
    """Queries [B, J, ...] put at their stream's lanes of every product, [B, terms, ..., width]."""
    placed = []
    for j, (start, stop) in enumerate(spans):
        term = terms[j if separate else 0]
        edge = (start - term.start, term.start + term.width - stop)
        placed.append(jnp.pad(queries[:, j], ((0, 0),) * 3 + (edge,)))
    placed = jnp.stack(placed, axis=1)
    return placed if separate else placed.sum(1, keepdims=True)
