"""Early exits: the lower layers draft tokens one by one, the upper ones then run for all of them.

What the lower layers computed is kept, their hidden states and whatever of their streams the upper
layers or the end of the call need, so that nothing is computed twice (LayerSkip, arXiv 2404.16710).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fusedkv_jax.cache import KVCache
from fusedkv_jax.cache.calls import Call
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.model.decoder import Decoder
from fusedkv_jax.model.stack import Queries, run_layers
from fusedkv_jax.model.stream_plan import Bank, StreamPlan
from fusedkv_jax.model.streams import Streams


class Draft(NamedTuple):
    """Tokens that have passed through the lower layers only.

    Attributes:
        cache: holds their streams.
        hidden: what the lower layers gave for each of them, [B, T, D].
        bank: their streams that the upper layers and the end of the call need, per kind
            [slots, B, T, K, H]; None where nobody needs any.
    """

    cache: KVCache
    hidden: Float[Array, "B T D"]
    bank: Bank


def begin_draft(model: Decoder, cache: KVCache, length: int) -> Draft:
    """An empty draft that holds up to `length` tokens of each row.

    Raises:
        ValueError: what `cache` keeps cannot be taken back.
    """
    for store in cache.stores:
        if not store.rewinds:
            raise ValueError(
                f"speculation cannot take back what a rejected token has changed in a"
                f" {type(store).__name__}, or reads it in another way than single tokens do; use it"
                " without this compression"
            )
    config = model.config
    streams = _later(config, cache, jnp.zeros_like(cache.lengths), length)
    hidden = jnp.zeros((cache.lengths.shape[0], length, config.d_model), config.dtype)
    return Draft(cache, hidden, streams.bank)


def extend_draft(
    model: Decoder,
    draft: Draft,
    tokens: Int[Array, "B"],
    running: Bool[Array, "B"],
    place: Int[Array, ""],
    exit_layer: int,
) -> tuple[Float[Array, "B D"], Draft]:
    """Pass one token of each running row through the layers below `exit_layer`.

    Args:
        model: the model; one of its runs must begin at `exit_layer`.
        draft: the tokens before it.
        tokens: int32 tokens.
        running: rows that have a token.
        place: number of tokens in the draft.
        exit_layer: number of lower layers.

    Returns:
        What the lower layers gave, for `exit_logits`, and the longer draft.
    """
    cache, length = draft.cache, draft.hidden.shape[1]
    call = Call(cache.lengths, running.astype(jnp.int32), 1)
    # One token, of which the bank gets what the call of all drafted tokens will need.
    later = dataclasses.replace(call, length=length)
    plan = StreamPlan.of(model.config, cache.plan, cache.stores, later)
    streams = Streams.of_cache(model.config, cache, call, plan)
    positions = call.positions
    queries = Queries(model.rotation(positions), positions)
    x = model.embed(tokens[:, None])
    x, streams, *_ = run_layers(model.layers(), x, streams, queries, (0, exit_layer))

    def put(array: Array, new: Array, axis: int) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(array, new, place, axis)

    bank: Bank = {
        kind: None if new is None or (old := draft.bank[kind]) is None else put(old, new, 2)
        for kind, new in streams.bank.items()
    }
    return x[:, 0], Draft(streams.close(), put(draft.hidden, x, 1), bank)


def exit_logits(model: Decoder, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Logits of the early exit: the final norm and head, which all exits share."""
    return model.logits(model.normed(x))


def verify_draft(
    model: Decoder,
    cache: KVCache,
    draft: Draft,
    count: Int[Array, "B"],
    exit_layer: int,
) -> tuple[Float[Array, "B T V"], Callable[[Array], KVCache]]:
    """Pass all tokens of a draft through the layers from `exit_layer` on, together.

    Args:
        model: the model.
        cache: the cache before the draft.
        draft: the draft.
        count: int32 number of its tokens in each row.
        exit_layer: number of lower layers.

    Returns:
        The logits that follow each token, and a function from the number of tokens of each row
        that are kept to the cache that holds just these.
    """
    config, length = model.config, draft.hidden.shape[1]
    streams = _later(config, cache, count, length)
    # What is written at the end of a call begins with what was there before the draft; the others
    # hold the draft, whose rejected tokens lie beyond the lengths and are overwritten.
    stores = tuple(
        old if old.writes_at_end(streams.call) else new
        for old, new in zip(cache.stores, draft.cache.stores, strict=True)
    )
    streams = dataclasses.replace(streams, stores=stores, bank=draft.bank)
    streams = _write_lower_layers(streams, exit_layer)
    positions = streams.call.positions
    queries, upper = Queries(model.rotation(positions), positions), (exit_layer, config.num_layers)
    x, streams, *_ = run_layers(model.layers(), draft.hidden, streams, queries, upper)

    def keep(tokens: Array) -> KVCache:
        call = dataclasses.replace(streams.call, count=tokens)
        return dataclasses.replace(streams, call=call).close()

    return exit_logits(model, x), keep


def _later(config: ModelConfig, cache: KVCache, count: Array, length: int) -> Streams:
    """The streams of one call with all tokens of a draft."""
    return Streams.of_cache(config, cache, Call(cache.lengths, count, length))


def _write_lower_layers(streams: Streams, exit_layer: int) -> Streams:
    """Give stores that write at the end the lower layers' streams, as a call through all would."""
    stores = list(streams.stores)
    for (kind, i), (group, slot) in streams.plan.groups.places.items():
        if i < exit_layer and stores[group].writes_at_end(streams.call):
            new = streams.banked(kind, i)
            stores[group] = stores[group].write(kind, slot, new, streams.call)
    return dataclasses.replace(streams, stores=tuple(stores))
