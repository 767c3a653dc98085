"""A step over pages: tokens of many requests together, the upper layers for sampled rows alone."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from fusedkv_jax.cache.paged import PagedCall, PagedStore
from fusedkv_jax.cache.shardings import constrain_cache
from fusedkv_jax.model.decoder import Decoder
from fusedkv_jax.model.early_exit import exit_logits
from fusedkv_jax.model.stack import Queries, run_layers
from fusedkv_jax.model.streams import Streams


def extend_pages(
    model: Decoder,
    tokens: Int[Array, "N"],
    call: PagedCall,
    pool: PagedStore,
    sampled: Int[Array, "R T"],
) -> tuple[Float[Array, "S V"] | None, PagedStore]:
    """Add new tokens of many requests to a pool of pages.

    All tokens pass together through the layers that cache something (`prefill_depth`), and those
    that are sampled through the layers above. Nothing is checked: whoever schedules the step
    knows that the pages are there.

    Args:
        model: the model.
        tokens: int32 new tokens, lane after lane; any for padding.
        call: where they are.
        pool: the pages.
        sampled: numbers of the tokens whose logits are wanted, each row those of one request;
            padded with -1 at its end, where logits mean nothing. With R = 0 the upper layers do
            not run.

    Returns:
        Logits of these S = R * T tokens in float32, None for R = 0, and the pool.
    """
    config, depth = model.config, model.config.kv_layout.prefill_depth
    streams = Streams.of_pages(config, pool, call)
    layers, positions = model.layers(), call.positions
    queries = Queries(model.rotation(positions), positions)
    x = model.embed(tokens[None])
    x, streams, _, _ = run_layers(layers, x, streams, queries, (0, depth))
    if not sampled.shape[0]:
        return None, _pool(streams)
    above = call.take(sampled)
    queries = Queries(model.rotation(above.positions), above.positions)
    x, streams = x[:, sampled.ravel()], streams.narrowed(above)
    x, streams, _, _ = run_layers(layers, x, streams, queries, (depth, config.num_layers))
    return model.logits(model.normed(x))[0], _pool(streams)


def exit_pages(
    model: Decoder,
    tokens: Int[Array, "N"],
    call: PagedCall,
    pool: PagedStore,
    exit_layer: int,
) -> tuple[Float[Array, "N V"], PagedStore]:
    """Add new tokens to what the layers below an early exit cache.

    Args:
        model: the model; one of its runs must begin at `exit_layer`.
        tokens: int32 new tokens, lane after lane; any for padding.
        call: where they are.
        pool: the pages.
        exit_layer: number of lower layers.

    Returns:
        Logits of the early exit in float32, and the pool.
    """
    streams = Streams.of_pages(model.config, pool, call)
    queries = Queries(model.rotation(call.positions))
    x = model.embed(tokens[None])
    x, streams, *_ = run_layers(model.layers(), x, streams, queries, (0, exit_layer))
    return exit_logits(model, x[0]), _pool(streams)


def _pool(streams: Streams) -> PagedStore:
    (pool,) = streams.stores
    assert isinstance(pool, PagedStore)
    return constrain_cache(pool)
