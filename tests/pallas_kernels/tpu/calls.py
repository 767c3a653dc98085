"""Calls of every kernel at sizes of real models, as shapes: to be lowered and compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import PagedStream, Pages, Quantized, RaggedRows, tpu
from pallas_kernels.masks import Mask
from tests.pallas_kernels.cases import call_of, paged_call_of, ragged_call_of

SIZES = {"batch": 4, "length": 4096, "kv_heads": 8, "heads": 32}


def spec(*shape, dtype="bfloat16"):
    """An array that is only a shape."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


integers = functools.partial(spec, dtype="int32")
floats = functools.partial(spec, dtype="float32")


def training(chip, size=128, sources=2, dtype="bfloat16", length=1024, segments=True, **options):
    """Forward and backward on packed sequences; (function, specs)."""
    query, stored = spec(2, length, 8, size, dtype=dtype), spec(2, length, 2, size, dtype=dtype)
    weights = floats(sources, 2, size) if sources > 1 else None
    ids = integers(2, length) if segments else None
    mask = Mask(causal=True, q_segment_ids=ids, kv_segment_ids=ids)

    def call(q, keys, values, a, b, mask, cotangents):
        def attend(*sources):
            made = call_of(sources, {"scale": 0.1} | options)
            return tpu.attention(dataclasses.replace(made, mask=mask), chip=chip)

        found, pull = jax.vjp(attend, q, keys, values, a, b)
        return found, pull(cotangents)

    side = (stored,) * sources
    return call, (query, side, side, weights, weights, mask, (query, floats(2, length, 8)))


def decoding(chip, dtype="bfloat16", ring=False, sources=2):
    """One token of each row over a contiguous cache; (function, specs)."""
    batch, length, heads = SIZES["batch"], 1024 if ring else SIZES["length"], SIZES["kv_heads"]
    source = spec(batch, length, heads, 128, dtype=dtype)
    if source.dtype.itemsize == 1:
        source = Quantized(source, floats(batch, length, heads, 1))
    weights = floats(sources, heads, 128) if sources > 1 else None
    if ring:
        mask = Mask(
            causal=True, window=length, q_positions=integers(batch, 1),
            kv_positions=integers(batch, length),
        )  # fmt: skip
    else:
        mask = Mask(causal=True, kv_lengths=integers(batch))

    def call(q, keys, values, a, b, mask):
        made = call_of((q, keys, values, a, b), {"scale": 0.1})
        return tpu.attention(dataclasses.replace(made, mask=mask), chip=chip)

    q = spec(batch, 1, SIZES["heads"], 128)
    return call, (q, (source,) * sources, (source,) * sources, weights, weights, mask)


def paging(chip, dtype="bfloat16", size=128, page_size=128, length=1):
    """The last tokens of each row over pages of two sources; (function, specs)."""
    batch, heads = SIZES["batch"], SIZES["kv_heads"]
    width = SIZES["length"] // page_size
    data = spec(batch * width, heads, page_size, 4 * size, dtype=dtype)
    scales = floats(*data.shape[:3], 4) if data.dtype.itemsize == 1 else None
    pages = Pages(data, scales, 2, 2, size, size)
    weights = floats(2, heads, size)

    def call(*arguments):
        return tpu.paged_attention(paged_call_of(*arguments, scale=0.1), chip=chip)

    q = spec(batch, length, SIZES["heads"], size)
    return call, (q, pages, integers(batch, width), integers(batch), weights, weights)


def stepping(chip, dtype="bfloat16", heads=(32, 8), size=128, page_size=16, sources=2):
    """A step of 64 rows and 1,024 tokens over a pool of two streams; (function, specs)."""
    rows, width, count = 64, SIZES["length"] // page_size, 65536 // page_size
    data = spec(2, count, page_size, heads[1] * size, dtype=dtype)
    lanes = -(-page_size * heads[1] // 128) * 128
    scale = floats(2, count, 1, lanes) if data.dtype.itemsize == 1 else None
    table = integers(rows, width)
    streams = tuple(PagedStream(data, integers(), table, size, scale) for _ in range(sources))
    weights = floats(sources, heads[1], size) if sources > 1 else None

    def call(pool, q, keys, values, rows, a, b):
        keys, values = (
            tuple(dataclasses.replace(x, data=pool[0], scale=pool[1]) for x in side)
            for side in (keys, values)
        )
        made = ragged_call_of(q, keys, values, rows, a, b, window=1000)
        return tpu.ragged_attention(dataclasses.replace(made, residuals=False), chip=chip)[0]

    rows = RaggedRows(integers(rows), integers(rows), integers(rows))
    streams = tuple(dataclasses.replace(x, data=None, scale=None) for x in streams)
    return call, (
        (data, scale),
        spec(1024, heads[0], size),
        streams,
        streams,
        rows,
        weights,
        weights,
    )
