"""The kernel launches of a call: their arguments, grids, constants and outputs."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import masks
from pallas_kernels.gpu import blocks, bounds
from pallas_kernels.gpu.device import Constants, GpuTarget
from pallas_kernels.gpu.inputs import Inputs, Lengths, Paging
from pallas_kernels.gpu.operands import Sources, pointers
from pallas_kernels.masks import Mask
from pallas_kernels.ragged_rows import RaggedRows
from pallas_kernels.sources import Result

# Positions of queries and keys, then their segments.
_Places = tuple[Array, Array, Array, Array]

_LOG2E = 1.4426950408889634
_RAGGED_ROWS = 64  # rows of a block of queries in a step with chunks


def chosen(
    kernel: str, device: GpuTarget, inputs: Inputs, rows: int | None = None
) -> blocks.BlockSizes:
    """Block sizes for a call, or for so many rows of one; see `blocks.choose`."""
    q, keys, values, mask = inputs.q, inputs.keys, inputs.values, inputs.mask
    mixed = keys.weights is not None or values.weights is not None
    traits = blocks.Traits(
        itemsize=q.dtype.itemsize,
        stored=max(keys.stored, values.stored),
        size=max(keys.padded, values.padded),
        sources=max(len(keys.arrays), len(values.arrays)) if mixed else 0,
        rows=rows or inputs.lengths.rows,
        simple=mask.window is None and mask.q_segment_ids is None,
    )
    return blocks.choose(kernel, device, traits)


def splits(device: GpuTarget, programs: int, keys: int, tile: int) -> int:
    """Splits of the keys that give every core two programs, of at least two tiles each."""
    return max(1, min(-(-2 * device.cores // programs), keys // (2 * tile)))


def decode(
    device: GpuTarget,
    inputs: Inputs,
    *,
    sizes: blocks.BlockSizes | None = None,
    parts: int | None = None,
) -> Result:
    """Output [B, T, N, H'] and lse [B, T, N] by the split kernel; few queries."""
    q, keys, values, mask = inputs.q, inputs.keys, inputs.values, inputs.mask
    shape = inputs.lengths
    batch, rows, heads = shape.batch, shape.rows, shape.kv_heads
    sizes = sizes or chosen("decode", device, inputs)
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
            _table(inputs.paging, span), span, span, shape.queries, shape.keys, 0,
        ),
        (partial, sums, sums),
        (batch * heads, parts),
        dict(
            _constants(inputs, q_at), **_stored(inputs), POSITIONS=mask.kv_positions is not None,
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
        _outputs(q, shape, values),
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
    """
    q, keys, values, shape = inputs.q, inputs.keys, inputs.values, inputs.lengths
    paging, num_rows = inputs.paging, rows.counts.shape[0]
    assert paging is not None and paging.slots is not None
    most = shape.groups if shape.queries <= num_rows else max(_RAGGED_ROWS, shape.groups)
    sizes = chosen("decode", device, inputs, most)
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
            _constants(inputs, span), **_stored(inputs), POSITIONS=False, K_ROWS=0, SPLITS=parts,
            RAGGED=True, BM=sizes.rows, BN=sizes.keys,
        ),
        sizes.warps,
        sizes.stages,
        device,
    )  # fmt: skip
    out, lse = device.launch(
        "decode.combine",
        (part, top, total, work, length),
        _outputs(q, shape, values),
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


def forward(device: GpuTarget, inputs: Inputs, *, sizes: blocks.BlockSizes | None = None) -> Result:
    """Output [B, T, N, H'] and lse [B, T, N] by the tile kernel."""
    q, shape = inputs.q, inputs.lengths
    sizes = sizes or chosen("forward", device, inputs)
    some, clear = _tiles(inputs.mask, shape, sizes)
    runs = bounds.runs(some, clear)
    where = _places(inputs.mask, shape)
    pointed = pointers(inputs.keys, inputs.values, shape.kv_heads, q.dtype, q, True)
    return device.launch(
        "forward.forward",
        (q, *pointed, runs, *where, _table(inputs.paging, runs), shape.queries, shape.keys),
        _outputs(q, shape, inputs.values),
        (-(-shape.rows // sizes.rows), shape.batch * shape.kv_heads),
        dict(
            _constants(inputs, where[0]), **_stored(inputs),
            **_place_constants(inputs.mask, where, runs), BM=sizes.rows, BN=sizes.keys,
        ),
        sizes.warps,
        sizes.stages,
        device,
    )  # fmt: skip


def backward(
    device: GpuTarget, inputs: Inputs, lse: Array, dout: Array, delta: Array
) -> tuple[Array, Array, Array]:
    """dq [B, T, N, H], and float32 dK^ [B, S, K, H], dV^ [B, S, K, H'].

    `lse` is +inf or huge where a row sees nothing; `delta` is sum(out * dout) - dlse.
    """
    q, shape = inputs.q, inputs.lengths
    where = _places(inputs.mask, shape)
    lse2 = jnp.minimum(lse * _LOG2E, 1e30)
    pointed = pointers(inputs.keys, inputs.values, shape.kv_heads, q.dtype, q, False)

    def run(
        kernel: str, transposed: bool, out: tuple[jax.ShapeDtypeStruct, ...]
    ) -> tuple[Array, ...]:
        sizes = chosen(kernel, device, inputs)
        some, clear = _tiles(inputs.mask, shape, sizes)
        if transposed:
            some, clear = some.swapaxes(1, 2), clear.swapaxes(1, 2)
            count = -(-shape.keys // sizes.keys)
        else:
            count = -(-shape.rows // sizes.rows)
        runs = bounds.runs(some, clear)
        return device.launch(
            f"backward.{kernel}",
            (q, *pointed, dout, lse2, delta, runs, *where, shape.queries, shape.keys),
            out,
            (count, shape.batch * shape.kv_heads),
            dict(
                _constants(inputs, where[0]), **_place_constants(inputs.mask, where, runs),
                BM=sizes.rows, BN=sizes.keys,
            ),
            sizes.warps,
            sizes.stages,
            device,
        )  # fmt: skip

    lead = (shape.batch, shape.keys, shape.kv_heads)
    sides = (inputs.keys, inputs.values)
    grads = tuple(jax.ShapeDtypeStruct((*lead, x.size), jnp.float32) for x in sides)
    dkey, dvalue = run("backward_keys", True, grads)
    (dq,) = run("backward_queries", False, (jax.ShapeDtypeStruct(q.shape, q.dtype),))
    return dq, dkey, dvalue


def _outputs(
    q: Array, shape: Lengths, values: Sources
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    lead = (shape.batch, shape.queries, shape.heads)
    return (
        jax.ShapeDtypeStruct((*lead, values.size), q.dtype),
        jax.ShapeDtypeStruct(lead, jnp.float32),
    )


def _tiles(mask: Mask, shape: Lengths, sizes: blocks.BlockSizes) -> tuple[Array, Array]:
    return bounds.tiles(
        mask, shape.queries, shape.keys, shape.groups, sizes.rows, sizes.keys
    )  # fmt: skip


def _places(mask: Mask, shape: Lengths) -> _Places:
    """Positions and segments of queries and keys, as `forward` takes them."""
    q_at = jnp.asarray(masks.query_positions(mask, shape.queries, shape.keys))
    k_at = jnp.asarray(masks.key_positions(mask, shape.keys))
    if mask.q_segment_ids is None:
        return q_at, k_at, q_at, k_at
    return q_at, k_at, mask.q_segment_ids, mask.kv_segment_ids


def _place_constants(mask: Mask, where: _Places, runs: Array) -> Constants:
    return {
        "SEGMENTS": mask.q_segment_ids is not None,
        "K_ROWS": int(where[1].shape[0] > 1),
        "BOUND_ROWS": int(runs.shape[0] > 1),
    }


def _constants(inputs: Inputs, q_at: Array) -> Constants:
    """What every kernel is compiled for."""
    keys, values, shape = inputs.keys, inputs.values, inputs.lengths
    return {
        "K": shape.kv_heads,
        "G": shape.groups,
        "H": keys.size,
        "HV": values.size,
        "BH": keys.padded,
        "BHV": values.padded,
        "NUM_K": len(keys.arrays),
        "NUM_V": len(values.arrays),
        "WEIGHTED_K": keys.weights is not None,
        "WEIGHTED_V": values.weights is not None,
        "CAUSAL": inputs.mask.causal,
        "WINDOW": inputs.mask.window or 0,
        "Q_ROWS": int(q_at.shape[0] > 1),
        "SCALE": float(inputs.scale),
        "SOFTCAP": float(inputs.softcap or 0.0),
    }


def _stored(inputs: Inputs) -> Constants:
    """What forward kernels are compiled for besides: scales, and records in pages."""
    keys, values, paging = inputs.keys, inputs.values, inputs.paging
    return {
        "QUANTIZED_K": bool(keys.scales),
        "QUANTIZED_V": bool(values.scales),
        "STRIDE_K": keys.stride,
        "STRIDE_V": values.stride,
        "SCALE_STRIDE": keys.scale_stride,
        "PAGE": 0 if paging is None else paging.size,
        "PAGES": 0 if paging is None else paging.table.shape[1],
    }


def _table(paging: Paging | None, unused: Array) -> Array:
    return unused if paging is None else paging.table
