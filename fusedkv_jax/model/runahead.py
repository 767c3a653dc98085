"""Prefill in parts along `context`: keys and values go down a chain (KV-Runahead, 2405.05329).

Worker i owns tokens [start_i, end_i) of every row. In each layer it writes its own streams, takes
those of [0, start_i) from worker i - 1, hands [0, end_i) on to worker i + 1 at once, and attends.
Where upper layers read streams of lower ones, each stream goes down the chain once, when it is
made. The workers do not wait for those behind them, so they run ahead by up to a layer each.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from fusedkv_jax.cache import CachePlan, KVCache, Store
from fusedkv_jax.cache.cache import unstacked
from fusedkv_jax.cache.calls import Call
from fusedkv_jax.cache.stacked import StackedStore
from fusedkv_jax.cache.storage import Slot, Storage, Tree, select
from fusedkv_jax.cache.stores import LinearStore, storage_of
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import Kind
from fusedkv_jax.model.decoder import Decoder, valid_rows
from fusedkv_jax.model.stack import Queries, run_layers
from fusedkv_jax.model.streams import Streams
from fusedkv_jax.sharding import RULES, MeshError, active_mesh, spec

AXIS = "context"


def extend_in_parts(
    model: Decoder,
    tokens: Int[Array, "B T"],
    count: Int[Array, "B"],
    cache: KVCache,
    ends: tuple[int, ...],
) -> tuple[Float[Array, "B V"], KVCache]:
    """`Decoder.extend` of an empty cache, under a mesh whose `context` axis takes the parts.

    Layers below `prefill_depth` run in parts; those above run for each row's last token.

    Args:
        model: the model.
        tokens: int32 prompts, right-padded.
        count: int32 number of tokens in each row.
        cache: an empty cache with room for T tokens.
        ends: where each part of the T columns ends; the last one is T.

    Returns:
        Logits of each row's last token in float32, and the cache, whole on every worker.

    Raises:
        ValueError: a layout or cache that has no such prefill. MeshError: not one part a worker.
    """
    check_parts(model.config, cache)
    mesh = active_mesh()
    workers = 1 if mesh is None else mesh.shape[AXIS]
    if workers != len(ends):
        raise MeshError(f"{len(ends)} parts of the prompt need mesh.context={len(ends)}")
    if mesh is None:
        logits, cache = model.extend(tokens, count, cache)
        assert logits is not None
        return logits, cache
    graph, params = nnx.split(model)
    rows = spec(("batch",), count.shape, mesh)
    stores = P(None, *rows)
    # Rows are split by hand as well, `tensor` by the partitioner; parameters are whole along the
    # other axes meanwhile.
    lower = jax.shard_map(
        functools.partial(_lower_layers, graph, ends, cache.plan),
        mesh=mesh,
        in_specs=(P(), (rows, rows), stores),
        out_specs=(rows, stores),
        axis_names={AXIS, *RULES["batch"]},
        check_vma=False,
    )
    together = [isinstance(store, StackedStore) for store in cache.stores]
    x, stores = lower(params, (tokens, count), unstacked(cache).stores)
    pairs = zip(stores, together, strict=True)
    stores = tuple(StackedStore.of(store) if stack else store for store, stack in pairs)
    cache = dataclasses.replace(cache, stores=stores)
    config = model.config
    streams = Streams.of_cache(config, cache, Call(cache.lengths, count, 1))
    positions = jnp.maximum(count - 1, 0)[:, None]
    queries = Queries(model.rotation(positions), positions)
    upper = config.kv_layout.prefill_depth, config.num_layers
    x, streams, *_ = run_layers(model.layers(), x, streams, queries, upper)
    cache = streams.close().advanced(valid_rows(tokens, count, config.vocab_size))
    x = jnp.where(cache.overflowed[:, None, None], jnp.nan, x)  # as `Decoder.extend` tells of them
    return model.logits(model.normed(x))[:, -1], cache


def check_parts(config: ModelConfig, cache: KVCache) -> None:
    """Raises ValueError where prefill in parts does not serve a layout or a cache."""
    if config.kv_layout.is_cyclic:
        raise ValueError(
            "prefill in parts does not serve cyclic layouts, whose lower layers wait for upper"
            " ones; prefill without parts"
        )
    for store in cache.stores:
        plain = type(store) is LinearStore and store.dropped is None
        if not plain and type(store) is not StackedStore:
            raise ValueError(
                f"prefill in parts does not serve a {type(store).__name__}, which does not keep"
                " all tokens as they came (windows, int4, compressors); prefill without parts"
            )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "dropped"],
    meta_fields=["ends"],
)
@dataclass(frozen=True)
class PartStore(LinearStore):
    """A worker's tokens: each stream that it writes goes down the chain with all parts before.

    Attributes:
        ends: where each part ends.
    """

    ends: tuple[int, ...] = ()

    def write(self, kind: Kind, slot: Slot, new: Float[Array, "B T K H"], call: Call) -> Store:
        store = super().write(kind, slot, new, call)
        return store._with(kind, _hand_on(storage_of(store, kind), slot, self.ends))


def _lower_layers(
    graph: nnx.GraphDef[Decoder],
    ends: tuple[int, ...],
    plan: CachePlan,
    params: nnx.State,
    prompts: tuple[Int[Array, "B T"], Int[Array, "B"]],
    stores: tuple[Store, ...],
) -> tuple[Float[Array, "B 1 D"], tuple[Store, ...]]:
    """One worker: its part through the layers below `prefill_depth`.

    Returns:
        What they gave for each row's last token, and the stores; the same everywhere.
    """
    model, (tokens, count) = nnx.merge(graph, params), prompts
    starts = (0, *ends[:-1])
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    me, width = jax.lax.axis_index(AXIS), max(sizes)
    start, size = jnp.asarray(starts)[me], jnp.asarray(sizes)[me]
    padded = jnp.pad(tokens, ((0, 0), (0, width)))  # a slice beyond the end would move back
    own = jax.lax.dynamic_slice_in_dim(padded, start, width, 1)
    call = Call(jnp.full_like(count, start), jnp.clip(count - start, 0, size), width)
    parts = tuple(PartStore(*_storages(store), ends=ends) for store in stores)
    cache = KVCache(parts, jnp.zeros_like(count), plan)
    streams = Streams.of_cache(model.config, cache, call)
    x = model.embed(own)
    # Padding sees nothing, which kernels can skip.
    queries = Queries(model.rotation(call.positions), call.valid_positions)
    depth = model.config.kv_layout.prefill_depth
    x, streams, *_ = run_layers(model.layers(), x, streams, queries, (0, depth))
    last = jnp.maximum(count - 1, 0) - start
    place = jnp.clip(last, 0, width - 1)[:, None, None]
    mine = ((last >= 0) & (last < size))[:, None, None]
    found = jnp.where(mine, jnp.take_along_axis(x, place, axis=1).astype(jnp.float32), 0)
    plain = tuple(LinearStore(*_storages(store)) for store in streams.stores)
    stores = jax.tree.map(functools.partial(_hand_back, ends=ends), plain)
    return jax.lax.psum(found, AXIS).astype(x.dtype), stores


def _storages(store: Store) -> tuple[Storage, Storage]:
    return storage_of(store, "key"), storage_of(store, "value")


def _hand_on(storage: Tree, slot: Slot, ends: tuple[int, ...]) -> Tree:
    """One stream down the chain: worker i sends exactly its first end_i tokens."""
    me = jax.lax.axis_index(AXIS)

    def through(stream: Shaped[Array, "B S *rest"]) -> Array:
        for i, end in enumerate(ends[:-1]):
            before = stream[:, :end]
            sent = jax.lax.ppermute(before, AXIS, [(i, i + 1)])
            stream = stream.at[:, :end].set(jnp.where(me == i + 1, sent, before))
        return stream

    streams = jax.tree.map(through, select(storage, slot))
    return jax.tree.map(
        lambda array, new: jax.lax.dynamic_update_index_in_dim(array, new, slot, 0),
        storage,
        streams,
    )


def _hand_back(array: Array, ends: tuple[int, ...]) -> Array:
    """Storage [P, B, S, ...] up the chain: worker i gets exactly the tokens after its own."""
    me = jax.lax.axis_index(AXIS)
    for i, end in reversed(list(enumerate(ends[:-1]))):
        after = array[:, :, end : ends[-1]]
        sent = jax.lax.ppermute(after, AXIS, [(i + 1, i)])
        array = array.at[:, :, end : ends[-1]].set(jnp.where(me == i, sent, after))
    return array
