"""Launches of the tile kernels, forward and backward; and what all launches have in common."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import masks
from pallas_kernels.gpu import blocks, bounds
from pallas_kernels.gpu.device import Constants, GpuTarget
from pallas_kernels.gpu.inputs import Inputs, Lengths, Paging
from pallas_kernels.gpu.operands import Sources, pointers
from pallas_kernels.masks import Mask
from pallas_kernels.sources import Result

# Positions of queries and keys, then their segments.
_Places = tuple[Array, Array, Array, Array]

_LOG2E = 1.4426950408889634
_GRID_Y = 2**16 - 1  # programs of a grid's second axis, CUDA's limit


def chosen(kernel: str, device: GpuTarget, inputs: Inputs) -> blocks.BlockSizes:
    """Block sizes for a call; see `blocks.choose`."""
    return blocks.choose(kernel, device, traits(inputs, inputs.lengths.rows))


def traits(inputs: Inputs, rows: int) -> blocks.Traits:
    """What block sizes depend on, in a call or in so many rows of one."""
    q, keys, values, mask = inputs.q, inputs.keys, inputs.values, inputs.mask
    mixed = keys.weights is not None or values.weights is not None
    return blocks.Traits(
        itemsize=q.dtype.itemsize,
        stored=max(keys.stored, values.stored),
        size=max(keys.padded, values.padded),
        sources=max(len(keys.arrays), len(values.arrays)) if mixed else 0,
        rows=rows,
        simple=mask.window is None and mask.q_segment_ids is None,
    )


def forward(device: GpuTarget, inputs: Inputs, *, sizes: blocks.BlockSizes | None = None) -> Result:
    """Output [B, T, N, H'] and lse [B, T, N] by the tile kernel.

    Raises:
      NotImplementedError: more rows and heads than a grid has.
    """
    q, shape = inputs.q, inputs.lengths
    _check_grid(shape)
    sizes = sizes or chosen("forward", device, inputs)
    some, clear = _tiles(inputs.mask, shape, sizes)
    runs = bounds.runs(some, clear)
    where = _places(inputs.mask, shape)
    pointed = pointers(inputs.keys, inputs.values, shape.kv_heads, q.dtype, q, True)
    return device.launch(
        "forward.forward",
        (q, *pointed, runs, *where, table(inputs.paging, runs), shape.queries, shape.keys),
        outputs(q, shape, inputs.values),
        (-(-shape.rows // sizes.rows), shape.batch * shape.kv_heads),
        dict(
            constants(inputs, where[0]), **stored(inputs),
            **_place_constants(inputs.mask, where, runs),
            BM=sizes.rows, BN=sizes.keys, STAGES=sizes.stages,
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

    Raises:
      NotImplementedError: more rows and heads than a grid has.
    """
    q, shape = inputs.q, inputs.lengths
    _check_grid(shape)
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
                constants(inputs, where[0]), **_place_constants(inputs.mask, where, runs),
                BM=sizes.rows, BN=sizes.keys, STAGES=sizes.stages,
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


def _check_grid(shape: Lengths) -> None:
    programs = shape.batch * shape.kv_heads
    if programs > _GRID_Y:
        raise NotImplementedError(
            f"{shape.batch} rows of {shape.kv_heads} KV heads are {programs} programs of {_GRID_Y} "
            f"that a grid has; use a smaller batch"
        )


def outputs(
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


def constants(inputs: Inputs, q_at: Array) -> Constants:
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


def stored(inputs: Inputs) -> Constants:
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


def table(paging: Paging | None, unused: Array) -> Array:
    return unused if paging is None else paging.table
