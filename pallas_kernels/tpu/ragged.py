"""The ragged kernel's call: what it serves, its sizes, operands and memory; see `ragged_kernel`.

The list of work is cut into a part for each core of the device (two of v5p).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.call import RaggedAttentionCall
from pallas_kernels.tpu import chips, ragged_kernel
from pallas_kernels.tpu import ragged_inputs as inputs
from pallas_kernels.tpu.blocks import LANES
from pallas_kernels.tpu.how import How
from pallas_kernels.tpu.ragged_copies import Static
from pallas_kernels.tpu.ragged_inputs import RaggedForm

_KEY_BYTES = 4 * 2**20  # of a block of keys and values, of which two are in VMEM
_KEY_TOKENS = 512  # of a block of keys at most: bounds the score tile
_SMEM = 640 * 2**10  # bytes of tables and lists that scalar memory holds, besides the compiler's


def ragged(how: How, call: RaggedAttentionCall) -> tuple[Array, Array | None]:
    """(out, lse) of the queries of all rows, no lse where none is wanted; see
    `pallas_kernels.ragged_attention`.

    Raises:
      NotImplementedError: a storage or a shape that would have to be turned.
    """
    streams = (*call.sources.keys, *call.sources.values)
    form = RaggedForm.of(call, how)
    _check(how, call)
    total, (num_rows, width) = call.q.shape[0], streams[0].table.shape
    num_pages, page_size = streams[0].data.shape[1], streams[0].page_size
    token_bytes = sum(x.data.shape[-1] * x.dtype.itemsize for x in streams)
    most = min(_KEY_TOKENS, _KEY_BYTES // token_bytes)
    pages = max(1, min(most // page_size, width))
    whole = LANES if streams[0].scale is not None or not how.interpret else 1
    while pages * page_size % whole:  # a block's tokens fill whole lanes
        pages += 1
    static = Static(how, form, call.window, pages, page_size, width)
    work = inputs.work_list(call, form, static.tokens, how.chip.cores)
    place, query = inputs.places(call.rows, work.units, total, form)
    queries = inputs.in_units(call, form, how.query_factor, query)
    table = jnp.clip(streams[0].table, 0, num_pages - 1).astype(jnp.int32).reshape(-1)
    slots = jnp.stack([jnp.asarray(x.slot, jnp.int32) for x in streams])
    if 4 * (table.size + work.numbers.size) > _SMEM:
        raise NotImplementedError(
            f"a table of {num_rows} x {width} pages does not fit into scalar memory; use larger "
            f"pages"
        )
    out, lse = _run(static, call, (work.numbers, work.bounds, table, slots), queries)
    out = inputs.from_units(out, place, form)
    return out, None if lse is None else inputs.lse_from_units(lse[..., 0], place, form)


def _check(how: How, call: RaggedAttentionCall) -> None:
    """Refuses what the chip, or its copies, cannot read in place."""
    if call.q.dtype not in ("bfloat16", "float32"):
        raise NotImplementedError(f"q is {call.q.dtype}; TPUs take bfloat16 and float32")
    both = (*call.sources.keys, *call.sources.values)
    for stream in both:
        chips.check_storage(how.chip, stream.dtype)
    scaled = [x.scale is not None for x in both]
    size = call.sources.keys[0].page_size
    if any(scaled) and not all(scaled):
        raise NotImplementedError("the kernel reads streams that are all quantized, or none")
    if any(x.scale is not None and x.scale.shape[2] > 1 for x in both):
        raise NotImplementedError("scales in groups are for a mesh, on which each device has one")
    if any(scaled) and LANES % size and size % LANES:
        raise NotImplementedError(
            f"8-bit pages of {size} tokens; the kernel reads those of a power of two"
        )


def _run(
    static: Static,
    call: RaggedAttentionCall,
    scalars: tuple[Array, Array, Array, Array],
    queries: Array,
) -> tuple[Array, Array | None]:
    """The kernel: [units, parts, unit rows, width] of the output, and of the lse if wanted."""
    how, form, streams = static.how, static.form, (*call.sources.keys, *call.sources.values)
    small = (
        inputs.tokens_of_rows(form),
        inputs.output_weights(call.sources.value_weights, form),
        *inputs.scale_places(call, form, static.scale_tokens),
    )
    stored = [x.data for x in streams]
    scales = [inputs.scales(x) for x in streams if x.scale is not None]
    results = [(form.value_width, call.q.dtype), (LANES, jnp.float32)][: 1 + call.residuals]
    lead = (form.parts, form.unit_rows)

    def kernel(numbers: Ref, bounds: Ref, table: Ref, slots: Ref, given: Any, *refs: Any) -> None:
        written, (made, *rest) = refs[: len(results)], refs[len(results) :]
        (out, lse), (block, block_lse) = (*written, None)[:2], (*made, None)[:2]
        ragged_kernel.kernel(
            static, numbers, bounds, table, slots, *given, out, lse, block, block_lse, *rest
        )

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    whole = [pl.BlockSpec(x.shape, lambda *_, axes=x.ndim: (0,) * axes) for x in small]
    found = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(how.chip.cores, jnp.diff(scalars[1]).max()),
            in_specs=[(*whole, anywhere, [anywhere] * len(stored), [anywhere] * len(scales))],
            out_specs=[anywhere] * len(results),
            scratch_shapes=[
                [pltpu.VMEM((form.units, *lead, width), dtype) for width, dtype in results],
                *_scratch(static, call, len(scales), small[3].shape[1]),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((queries.shape[0], *lead, width), dtype)
            for width, dtype in results
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=how.chip.vmem * 3 // 4,
            disable_bounds_checks=True,
        ),
        interpret=how.interpret,
        name="ragged",
    )(*scalars, (*small, queries, stored, scales))
    return found[0], found[1] if call.residuals else None


def _scratch(static: Static, call: RaggedAttentionCall, scaled: int, lanes: int) -> list[Any]:
    """Queries, keys and values, scales; semaphores; sums; and which half is at work."""
    form, streams = static.form, (*call.sources.keys, *call.sources.values)
    rows = form.units * form.unit_rows
    query = (2, form.units, form.parts, form.num_keys, form.unit_rows, form.key_width)
    return [
        pltpu.VMEM(query, call.q.dtype),
        [pltpu.VMEM((2, static.pages, *x.data.shape[2:]), x.dtype) for x in streams],
        [pltpu.VMEM((2, static.pages * static.scale_rows, 1, lanes), jnp.float32)] * scaled,
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA,
        pltpu.VMEM((form.parts, rows, LANES), jnp.float32),
        pltpu.VMEM((form.parts, rows, LANES), jnp.float32),
        pltpu.VMEM((form.parts, form.num_values, rows, form.value_width), jnp.float32),
        pltpu.SMEM((1,), jnp.int32),
    ]
