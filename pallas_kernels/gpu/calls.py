"""The kernel launches of a call: their arguments, grids, constants and outputs."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import masks
from pallas_kernels.gpu import blocks, bounds
from pallas_kernels.gpu.device import Constants, GpuTarget
from pallas_kernels.gpu.lengths import Lengths, Paging, lengths
from pallas_kernels.gpu.operands import Sources, pointers
from pallas_kernels.masks import Mask

# Positions of queries and keys, then their segments.
_Places = tuple[Array, Array, Array, Array]

_LOG2E = 1.4426950408889634


def chosen(
    kernel: str, device: GpuTarget, q: Array, keys: Sources, values: Sources, mask: Mask, rows: int
) -> blocks.BlockSizes:
    """Block sizes for a call; see `blocks.choose`."""
    mixed = keys.weights is not None or values.weights is not None
    return blocks.choose(
        kernel,
        device.kind,
        itemsize=q.dtype.itemsize,
        stored=max(keys.stored, values.stored),
        size=max(keys.padded, values.padded),
        sources=max(len(keys.arrays), len(values.arrays)) if mixed else 0,
        rows=rows,
        simple=mask.window is None and mask.q_segment_ids is None,
    )


def splits(device: GpuTarget, programs: int, keys: int, tile: int) -> int:
    """Splits of the keys that give every core two programs, of at least two tiles each."""
    return max(1, min(-(-2 * device.cores // programs), keys // (2 * tile)))


def decode(
    device: GpuTarget, q: Array, keys: Sources, values: Sources, mask: Mask,
    paging: Paging | None, *, scale: float, softcap: float | None,
    sizes: blocks.BlockSizes | None = None, parts: int | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Output [B, T, N, H'] and lse [B, T, N] by the split kernel; few queries."""
    shape = lengths(q, keys, paging)
    batch, rows, heads = shape.batch, shape.rows, shape.kv_heads
    sizes = sizes or chosen("decode", device, q, keys, values, mask, rows)
    parts = parts or splits(device, batch * heads, shape.keys, sizes.keys)
    span = bounds.token_span(mask, shape.queries, shape.keys)
    span = jnp.broadcast_to(span, (batch, 2))
    q_at = jnp.asarray(masks.query_positions(mask, shape.queries, shape.keys))
    k_at = span if mask.kv_positions is None else masks.key_positions(mask, shape.keys)
    constants = _constants(shape, keys, values, mask, scale, softcap, q_at)
    partial = jax.ShapeDtypeStruct((batch, heads, parts, rows, values.size), jnp.float32)
    sums = jax.ShapeDtypeStruct(partial.shape[:-1], jnp.float32)
    part, top, total = device.launch(
        "decode.decode",
        (
            q, *pointers(keys, values, heads, q.dtype, q, True), span, q_at, k_at,
            _table(paging, span), shape.queries, shape.keys,
        ),
        (partial, sums, sums),
        (batch * heads, parts),
        dict(
            constants, **_paging(paging, keys), POSITIONS=mask.kv_positions is not None,
            QUANTIZED_K=bool(keys.scales), QUANTIZED_V=bool(values.scales),
            K_ROWS=int(k_at.shape[0] > 1), SPLITS=parts, BM=sizes.rows, BN=sizes.keys,
        ),
        sizes.warps,
        sizes.stages,
        device,
    )  # fmt: skip
    return device.launch(
        "decode.combine",
        (part, top, total, shape.queries),
        _outputs(q, shape, values),
        (batch * heads, rows),
        {
            "K": heads, "G": shape.groups, "HV": values.size, "BHV": values.padded,
            "SPLITS": parts, "ALL": 1 << (parts - 1).bit_length(), "CHUNK": 16,
        },
        4,
        1,
        device,
    )  # fmt: skip


def forward(
    device: GpuTarget, q: Array, keys: Sources, values: Sources, mask: Mask,
    paging: Paging | None, *, scale: float, softcap: float | None,
    sizes: blocks.BlockSizes | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Output [B, T, N, H'] and lse [B, T, N] by the tile kernel."""
    shape = lengths(q, keys, paging)
    sizes = sizes or chosen("forward", device, q, keys, values, mask, shape.rows)
    some, clear = _tiles(mask, shape, sizes)
    runs = bounds.runs(some, clear)
    where = _places(mask, shape)
    return device.launch(
        "forward.forward",
        (
            q, *pointers(keys, values, shape.kv_heads, q.dtype, q, True), runs, *where,
            _table(paging, runs), shape.queries, shape.keys,
        ),
        _outputs(q, shape, values),
        (-(-shape.rows // sizes.rows), shape.batch * shape.kv_heads),
        dict(
            _constants(shape, keys, values, mask, scale, softcap, where[0]),
            **_paging(paging, keys), **_place_constants(mask, where, runs),
            QUANTIZED_K=bool(keys.scales), QUANTIZED_V=bool(values.scales),
            BM=sizes.rows, BN=sizes.keys,
        ),
        sizes.warps,
        sizes.stages,
        device,
    )  # fmt: skip


def backward(
    device: GpuTarget, q: Array, keys: Sources, values: Sources, mask: Mask, lse: Array,
    dout: Array, delta: Array, *, scale: float, softcap: float | None,
    sizes: tuple[blocks.BlockSizes | None, blocks.BlockSizes | None] = (None, None),
) -> tuple[Array, Array, Array]:  # fmt: skip
    """dq [B, T, N, H], and float32 dK^ [B, S, K, H], dV^ [B, S, K, H'].

    `lse` is +inf or huge where a row sees nothing; `delta` is sum(out * dout) - dlse.
    """
    shape = lengths(q, keys, None)
    where = _places(mask, shape)
    lse2 = jnp.minimum(lse * _LOG2E, 1e30)
    constants = _constants(shape, keys, values, mask, scale, softcap, where[0])
    for name in ("STRIDE_K", "STRIDE_V", "QUANTIZED_K", "QUANTIZED_V"):
        constants.pop(name, None)

    def run(
        kernel: str,
        sizes: blocks.BlockSizes | None,
        transposed: bool,
        out: tuple[jax.ShapeDtypeStruct, ...],
    ) -> tuple[Array, ...]:
        sizes = sizes or chosen(kernel, device, q, keys, values, mask, shape.rows)
        some, clear = _tiles(mask, shape, sizes)
        if transposed:
            some, clear = some.swapaxes(1, 2), clear.swapaxes(1, 2)
            count = -(-shape.keys // sizes.keys)
        else:
            count = -(-shape.rows // sizes.rows)
        runs = bounds.runs(some, clear)
        return device.launch(
            f"backward.{kernel}",
            (
                q, *pointers(keys, values, shape.kv_heads, q.dtype, q, False), dout, lse2, delta,
                runs, *where, shape.queries, shape.keys,
            ),
            out,
            (count, shape.batch * shape.kv_heads),
            dict(
                constants, **_place_constants(mask, where, runs), BM=sizes.rows, BN=sizes.keys
            ),
            sizes.warps,
            sizes.stages,
            device,
        )  # fmt: skip

    lead = (shape.batch, shape.keys, shape.kv_heads)
    grads = [jax.ShapeDtypeStruct((*lead, x.size), jnp.float32) for x in (keys, values)]
    dkey, dvalue = run("backward_keys", sizes[0], True, tuple(grads))
    (dq,) = run("backward_queries", sizes[1], False, (jax.ShapeDtypeStruct(q.shape, q.dtype),))
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


def _constants(
    shape: Lengths,
    keys: Sources,
    values: Sources,
    mask: Mask,
    scale: float,
    softcap: float | None,
    q_at: Array,
) -> Constants:
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
        "STRIDE_K": keys.stride,
        "STRIDE_V": values.stride,
        "CAUSAL": mask.causal,
        "WINDOW": mask.window or 0,
        "Q_ROWS": int(q_at.shape[0] > 1),
        "SCALE": float(scale),
        "SOFTCAP": float(softcap or 0.0),
    }


def _paging(paging: Paging | None, keys: Sources) -> Constants:
    return {
        "PAGE": 0 if paging is None else paging.size,
        "PAGES": 0 if paging is None else paging.table.shape[1],
        "SCALE_STRIDE": keys.scale_stride,
    }


def _table(paging: Paging | None, unused: Array) -> Array:
    return unused if paging is None else paging.table
