"""Calls of the GPU kernels that compilers are asked about, in sizes of real models.

They are traced, never computed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import gpu, quantize
from pallas_kernels.call import AttentionCall, PagedAttentionCall, RaggedAttentionCall
from pallas_kernels.gpu.device import GpuTarget
from pallas_kernels.masks import Mask
from pallas_kernels.paged_stream import PagedStream
from pallas_kernels.pages import Pages
from pallas_kernels.ragged_rows import RaggedRows
from pallas_kernels.sources import MixedSources


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A class of shapes that is reported.

    Attributes:
      name: what the report calls it.
      length: query tokens.
      keys: cached tokens.
      size: head size.
      sources: sources of keys and of values; 0 for one without weights.
      storage: dtype of the sources.
      dtype: dtype of the queries.
      paged: the sources are pages.
      ragged: a step of 64 rows and `length` tokens over pages of a pool.
      grad: also the backward pass.
      packed: with segments and a window, the mask that takes most registers.
    """

    name: str
    length: int
    keys: int = 4096
    size: int = 128
    sources: int = 2
    storage: str = "bfloat16"
    dtype: str = "bfloat16"
    paged: bool = False
    ragged: bool = False
    grad: bool = False
    packed: bool = False


_KINDS: dict[str, dict[str, Any]] = {
    "prefill, plain": {"length": 4096, "sources": 0},
    "training, fused": {"length": 4096, "grad": True},
    "training, packed": {"length": 4096, "grad": True, "packed": True},
    "decode, plain": {"length": 1, "sources": 0},
    "decode, fused": {"length": 1},
    "decode, fused, pages": {"length": 1, "paged": True},
    "decode, fused, int8": {"length": 1, "storage": "int8"},
    "decode, fused, int8 pages": {"length": 1, "storage": "int8", "paged": True},
    "decode, 64 rows, int8": {"length": 16, "storage": "int8"},
    "step, plain": {"length": 1024, "sources": 0, "ragged": True},
    "step, fused": {"length": 1024, "ragged": True},
    "step, fused, int8": {"length": 1024, "storage": "int8", "ragged": True},
}
_RARE: dict[str, dict[str, Any]] = {
    "training, 4 sources": {"length": 4096, "grad": True, "sources": 4},
    "decode, 4 sources": {"length": 1, "sources": 4},
}
CALLS = tuple(
    Workload(name=f"{name} H={size}", size=size, **options)
    for size, kinds in ((64, _KINDS | _RARE), (128, _KINDS | _RARE), (256, _RARE))
    for name, options in kinds.items()
) + tuple(
    Workload(
        name=f"training, fused, fp32 H={size}", length=4096, size=size, grad=True,
        dtype="float32", storage="float32",
    )
    for size in (64, 128)
)  # fmt: skip


def trace(call: Workload, device: GpuTarget) -> tuple:
    """The call itself, to be traced or lowered: nothing of these sizes is ever computed."""
    count = max(1, call.sources)
    q = jnp.zeros((2, call.length, 32, call.size), call.dtype)
    weights = jnp.ones((count, 8, call.size)) if call.sources else None
    if call.paged:
        pages = Pages.create(
            num_pages=64, page_size=64, num_kv_heads=8, num_keys=count, num_values=count,
            key_size=call.size, value_size=call.size, dtype=call.storage,
        )  # fmt: skip
        paged = PagedAttentionCall(
            q=q, pages=pages, page_table=jnp.zeros((2, call.keys // 64), jnp.int32),
            kv_lengths=jnp.full((2,), call.keys), key_weights=weights, value_weights=weights,
            window=None,
            scale=call.size**-0.5, softcap=None,
        )  # fmt: skip
        return gpu.paged_attention(paged, device=device)
    if call.ragged:
        return gpu.ragged_attention(_step(call, q[0], weights), device=device)
    made = sequence(call)
    if not call.grad:
        return gpu.attention(made, device=device)

    def run(q: Array, sources: MixedSources) -> tuple[Array, Array]:
        return gpu.attention(dataclasses.replace(made, q=q, sources=sources), device=device)

    out, pull = jax.vjp(run, q, made.sources)
    return pull(out)


def sequence(call: Workload) -> AttentionCall:
    """The call of a workload without pages."""
    count = max(1, call.sources)
    q = jnp.zeros((2, call.length, 32, call.size), call.dtype)
    weights = jnp.ones((count, 8, call.size)) if call.sources else None
    source = jnp.zeros((2, call.keys, 8, call.size), call.dtype)
    if call.storage != call.dtype:
        source = quantize(source, call.storage)
    mask = Mask(causal=True, kv_lengths=jnp.full((2,), call.keys))
    if call.packed:
        segments = [jnp.zeros((2, x), jnp.int32) for x in (call.length, call.keys)]
        mask = dataclasses.replace(
            mask, window=1024, q_segment_ids=segments[0], kv_segment_ids=segments[1]
        )
    sources = MixedSources((source,) * count, (source,) * count, weights, weights)
    return AttentionCall(q=q, sources=sources, mask=mask, scale=call.size**-0.5, softcap=None)


def _step(call: Workload, q: Array, weights: Array | None) -> RaggedAttentionCall:
    """A step whose streams are those of one pool."""
    rows, count, page = 64, max(1, call.sources), 16
    data = jnp.zeros((2, 1024, page, 8 * call.size), call.storage)
    scale = jnp.zeros((*data.shape[:2], 1, data.shape[2] * 8)) if data.dtype.itemsize == 1 else None
    table, numbers = jnp.zeros((rows, call.keys // page), jnp.int32), jnp.zeros(rows, jnp.int32)
    side = (PagedStream(data, 0, table, call.size, scale),) * count
    return RaggedAttentionCall(
        q=q, sources=MixedSources(side, side, weights, weights),
        rows=RaggedRows(numbers, numbers, numbers), window=None, scale=call.size**-0.5,
        softcap=None, residuals=False,
    )  # fmt: skip


def entry_calls(entry: dict[str, Any]) -> tuple[Workload, ...]:
    """Calls that use an entry of the table."""
    storage = {1: "int8", 2: "bfloat16"}[entry["stored"]]
    call = functools.partial(
        Workload,
        name=entry["kernel"],
        size=entry["size"],
        sources=entry["sources"],
        storage=storage,
    )
    if entry["kernel"] == "decode":
        return tuple(call(length=entry["max_rows"] // 4, paged=x) for x in (False, True))
    grad = entry["kernel"] != "forward"
    masks = (not entry["simple"],) if "simple" in entry else (False, True)
    return tuple(call(length=4096, grad=grad, packed=x) for x in masks)
