"""Launches of the split kernel: few queries, or those of many rows, each with its keys in parts.

decode     every part of a row's keys:  sums of its softmax, and of its values
combine    every row of queries:        the parts, rescaled and added
"""

import jax
import jax.numpy as jnp

from pallas_kernels import devices, masks
from pallas_kernels.gpu import blocks, bounds, calls
from pallas_kernels.gpu.calls import constants, outputs, stored, table
from pallas_kernels.gpu.device import Constants, GpuTarget
from pallas_kernels.gpu.inputs import Inputs, Lengths
from pallas_kernels.gpu.operands import Sources, pointers
from pallas_kernels.ragged_rows import RaggedRows
from pallas_kernels.sources import Result

_RAGGED_ROWS = 64  # rows of a block of queries in a step with chunks, where they fit


def splits(device: GpuTarget, programs: int, keys: int, tile: int) -> int:
    """Splits of the keys that give every core two programs, of at least two tiles each."""
    return max(1, min(-(-2 * device.cores // programs), keys // (2 * tile)))


def sizes_for(device: GpuTarget, inputs: Inputs, rows: int) -> blocks.BlockSizes | None:
    """Block sizes for so many rows of queries; None where the chip cannot hold that many."""
    traits = calls.traits(inputs, rows)
    sizes = blocks.choose("decode", device, traits)
    held = blocks.split_bytes(sizes, traits)
    return sizes if held <= devices.shared_memory(device.compute_capability) else None


def decode(
    device: GpuTarget,
    inputs: Inputs,
    *,
    sizes: blocks.BlockSizes,
    parts: int | None = None,
) -> Result:
    """Output [B, T, N, H'] and lse [B, T, N] by the split kernel; few queries.

    Args:
      sizes: what `sizes_for` gives for all rows of the call.
    """
    q, keys, values, mask = inputs.q, inputs.keys, inputs.values, inputs.mask
    shape = inputs.lengths
    batch, rows, heads = shape.batch, shape.rows, shape.kv_heads
    parts = parts or splits(device, batch * heads, shape.keys, sizes.keys)
    span = bounds.token_span(mask, shape.queries, shape.keys)
    span = jnp.broadcast_to(span, (batch, 2))
    q_at = jnp.asarray(masks.query_positions(mask, shape.queries, shape.keys))
    k_at = span if mask.kv_positions is None else masks.key_positions(mask, shape.keys)
    partial = jax.ShapeDtypeStruct((batch, heads, parts, rows, values.size), jnp.float32)
    sums = jax.ShapeDtypeStruct(partial.shape[:-1], jnp.float32)
    part, top, total = device.launch(
        "decode.decode",
        (
            q, *pointers(keys, values, heads, q.dtype, q, True), span, q_at, k_at,
            table(inputs.paging, span), span, span, shape.queries, shape.keys, 0,
        ),
        (partial, sums, sums),
        (batch * heads, parts),
        dict(
            constants(inputs, q_at), **stored(inputs), POSITIONS=mask.kv_positions is not None,
            K_ROWS=int(k_at.shape[0] > 1), SPLITS=parts, RAGGED=False, BM=sizes.rows,
            BN=sizes.keys,
        ),
        sizes.warps,
        sizes.stages,
        device,
    )  # fmt: skip
    return device.launch(
        "decode.combine",
        (part, top, total, span, shape.queries),
        outputs(q, shape, values),
        (batch * heads, rows),
        _combine_constants(shape, values, parts, False),
        4,
        1,
        device,
    )


def ragged(device: GpuTarget, inputs: Inputs, rows: RaggedRows) -> Result:
    """Output [1, T, N, H'] and lse [1, T, N] by the split kernel, for the queries of many rows.

    A program has a block of one row's queries, as many as a chunk has use for; of a row that
    decodes it computes one, and waits for memory like a program of decoding.

    Raises:
      NotImplementedError: the chip cannot hold the queries of one token.
    """
    q, keys, values, shape = inputs.q, inputs.keys, inputs.values, inputs.lengths
    paging, num_rows = inputs.paging, rows.counts.shape[0]
    assert paging is not None and paging.slots is not None
    most = shape.groups if shape.queries <= num_rows else max(_RAGGED_ROWS, shape.groups)
    counts = (most, *(x for x in (32, 16) if shape.groups <= x < most))
    fitting = (sizes_for(device, inputs, x) for x in counts)
    sizes = next((x for x in fitting if x is not None), None)
    if sizes is None:
        raise NotImplementedError(
            f"{shape.groups} {q.dtype} query heads of size {keys.padded} for a KV head, "
            f"{len(keys.arrays)} sources: more than {device.kind} holds"
        )
    length = sizes.rows // shape.groups
    blocks_ = rows.blocks(shape.queries, length)
    pieces, heads = blocks_.rows.shape[0], shape.kv_heads
    work = jnp.stack([blocks_.rows, blocks_.starts, blocks_.counts, blocks_.positions], axis=1)
    high = jnp.clip(blocks_.positions + blocks_.counts, 0, shape.keys)
    low = jnp.zeros_like(high)
    if inputs.mask.window is not None:
        low = jnp.clip(blocks_.positions - inputs.mask.window + 1, 0, high)
    span = jnp.where(blocks_.counts[:, None] > 0, jnp.stack([low, high], axis=1), 0)
    parts = splits(device, pieces * heads, shape.keys, sizes.keys)
    lead = (pieces, heads, parts, length * shape.groups)
    partial = jax.ShapeDtypeStruct((*lead, values.size), jnp.float32)
    sums = jax.ShapeDtypeStruct(lead, jnp.float32)
    part, top, total = device.launch(
        "decode.decode",
        (
            q, *pointers(keys, values, heads, q.dtype, q, True), span, span, span, paging.table,
            work, paging.slots, length, shape.keys, paging.pool,
        ),
        (partial, sums, sums),
        (pieces * heads, parts),
        dict(
            constants(inputs, span), **stored(inputs), POSITIONS=False, K_ROWS=0, SPLITS=parts,
            RAGGED=True, BM=sizes.rows, BN=sizes.keys,
        ),
        sizes.warps,
        sizes.stages,
        device,
    )  # fmt: skip
    out, lse = device.launch(
        "decode.combine",
        (part, top, total, work, length),
        outputs(q, shape, values),
        (pieces * heads, lead[3]),
        _combine_constants(shape, values, parts, True),
        4,
        1,
        device,
    )
    owned = (rows.owners(shape.queries)[0] >= 0)[None, :, None]
    return jnp.where(owned[..., None], out, 0), jnp.where(owned, lse, -jnp.inf)


def _combine_constants(shape: Lengths, values: Sources, parts: int, ragged: bool) -> Constants:
    return {
        "K": shape.kv_heads, "G": shape.groups, "HV": values.size, "BHV": values.padded,
        "SPLITS": parts, "ALL": 1 << (parts - 1).bit_length(), "CHUNK": 16, "RAGGED": ragged,
    }  # fmt: skip
