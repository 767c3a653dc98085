"""PyramidInfer: prompts lose tokens on their way up, so upper layers compute and store fewer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache import KVCache
from fusedkv_jax.cache.calls import Call, Reading
from fusedkv_jax.cache.plan import Group
from fusedkv_jax.cache.stores import LinearStore
from fusedkv_jax.compression import scoring
from fusedkv_jax.compression.budgets import FIRST_TOKENS, pyramid_lengths, recent_tokens
from fusedkv_jax.compression.compressor import (
    Chunk,
    CompressionError,
    Compressor,
    Observed,
    check_count,
    check_share,
)
from fusedkv_jax.compression.token_sets import lengthened, merged, storages
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS
from fusedkv_jax.model import Decoder
from fusedkv_jax.model.decoder import valid_rows
from fusedkv_jax.model.stack import Options, Queries, run_layers
from fusedkv_jax.model.streams import Streams

_LAST_WEIGHT = 1.2  # of the newest query in the scores; the oldest has 1


class _Tokens(NamedTuple):
    """Tokens on their way up.

    Attributes:
        x: hidden states.
        positions: places in the chunk.
        held: how many each row still has.
        recent: how many of these always stay.
    """

    x: Float[Array, "B T D"]
    positions: Int[Array, "B T"]
    held: Int[Array, "B"]
    recent: Int[Array, "B"]


@dataclass(frozen=True)
class PyramidInfer(Compressor):
    """Prune hidden states between the layers of prefill (arXiv 2405.12532).

    The last fifth of a prompt always stays, and scores the tokens before it; each cut keeps a
    share of those that falls with depth towards `budget`. Outputs are not pruned.

    Attributes:
        budget: share of the context that the deepest cut keeps, p; 1 prunes nothing.
        interval: layers between cuts.

    Raises:
        CompressionError: a field is out of range.
    """

    budget: float = 0.9
    interval: int = 1

    title: ClassVar[str] = "PyramidInfer"

    @property
    def least_chunk(self) -> None:
        """All: the tokens that reach a layer depend on the whole chunk."""
        return None

    def __post_init__(self) -> None:
        check_share(self, "budget")
        check_count(self, "interval")

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        layout = config.kv_layout
        for i, layer in enumerate(layout.layers):
            streams = [layer.stream(kind) for kind in KINDS]
            if any(not stream.own or stream.sources for stream in streams):
                raise CompressionError(
                    f"PyramidInfer drops tokens between layers, but layer {i} reads streams of"
                    " other layers, in which those tokens are still there; use a layout without"
                    " sharing, such as mha"
                )
            if layer.window is not None:
                raise CompressionError(
                    f"PyramidInfer drops tokens between layers, so the window of layer {i} could"
                    " not be told; use a layout without windows"
                )

    def compress(
        self, model: Decoder, chunk: Chunk, cache: KVCache, observed: Observed
    ) -> tuple[Float[Array, "B V"], KVCache]:
        layers, most = model.config.num_layers, chunk.length
        table = pyramid_lengths(most, layers, self.budget, self.interval)
        widths = table.max(0)
        if (table == table[:, :1]).all():
            return super().compress(model, chunk, cache, observed)
        room = cache.keys[0].shape[2] - most
        cuts = [i for i in range(layers) if i == 0 or (table[:, i] != table[:, i - 1]).any()]
        spans = list(zip(cuts, [*cuts[1:], layers], strict=True))
        newest = recent_tokens(np.arange(most + 1))
        tokens = _Tokens(
            model.embed(chunk.tokens),
            jnp.broadcast_to(jnp.arange(most), chunk.tokens.shape),
            chunk.count,
            jnp.asarray(newest, jnp.int32)[chunk.count],
        )
        groups, stores = [], []
        for first, last in spans:
            held = jnp.asarray(table[:, first], jnp.int32)[chunk.count]
            tokens = tokens._replace(held=held)
            span = first, last
            x, cache, found = self._layers(model, tokens, cache, span, int(newest[-1]))
            tokens = tokens._replace(x=x)
            groups.append(Group(None, *(tuple(range(first, last)),) * 2))
            width = int(widths[first])
            keys, values = (
                lengthened(jax.tree.map(lambda a, w=width: a[:, :, :w], storage), room)
                for storage in storages(cache, groups[-1]).values()
            )
            stores.append(LinearStore(keys, values, chunk.count - held))
            if last < layers:
                after = jnp.asarray(table[:, last], jnp.int32)[chunk.count]
                index = _survivors(found, tokens, after, int(widths[last]))
                tokens = tokens._replace(
                    x=jnp.take_along_axis(x, index[..., None], axis=1),
                    positions=jnp.take_along_axis(tokens.positions, index, axis=1),
                )
        valid = valid_rows(chunk.tokens, chunk.count, model.config.vocab_size)
        cache = KVCache(cache.stores, chunk.count, cache.plan).advanced(valid)
        end = jnp.maximum(tokens.held - 1, 0)[:, None, None]
        x = jnp.take_along_axis(tokens.x, end, axis=1)
        x = jnp.where(cache.overflowed[:, None, None], jnp.nan, x)
        return model.logits(model.normed(x))[:, 0], merged(cache, groups, stores)

    def _layers(
        self, model: Decoder, tokens: _Tokens, cache: KVCache, span: tuple[int, int], rows: int
    ) -> tuple[Float[Array, "B T D"], KVCache, Float[Array, "B S"]]:
        """Hidden states through some layers; and the scores of the tokens in the last of them."""
        x, positions, held, recent = tokens

        def watch(reading: Reading) -> Float[Array, "B S"]:
            return _scores(reading, held, recent, rows)

        call = Call(jnp.zeros_like(held), held, x.shape[1])
        streams = Streams.of_cache(model.config, cache, call)
        queries = Queries(model.rotation(positions), call.positions)
        options = Options(watch=watch)
        walked = run_layers(model.layers(), x, streams, queries, span, options)
        cache = dataclasses.replace(cache, stores=walked.streams.stores)
        return walked.x, cache, walked.seen[span[1] - 1]


def _scores(
    reading: Reading, held: Int[Array, "B"], recent: Int[Array, "B"], rows: int
) -> Float[Array, "B S"]:
    """What the recent tokens attend to, over all heads, later queries counting more."""
    back = jnp.arange(rows, 0, -1)
    column = held[:, None] - back
    age = jnp.maximum(recent[:, None] - back, 0) / jnp.maximum(recent[:, None] - 1, 1)
    weights = jnp.where(back <= recent[:, None], 1 + (_LAST_WEIGHT - 1) * age, 0.0)
    place = jnp.maximum(column, 0)
    q = jnp.take_along_axis(reading.q, place[..., None, None], axis=1)
    lse = jnp.take_along_axis(reading.lse, place[..., None], axis=1)
    mass = scoring.received(reading._replace(q=q, lse=lse), column, held, weights)
    return mass.mean(1)


def _survivors(
    scores: Float[Array, "B S"], tokens: _Tokens, after: Int[Array, "B"], width: int
) -> Int[Array, "B M"]:
    """Slots of the tokens that go on to the next layers, in order; padding after them."""
    held, recent = tokens.held, tokens.recent
    slot = jnp.arange(scores.shape[1])
    certain = (slot < FIRST_TOKENS) | (slot >= (held - recent)[:, None])
    scores = jnp.where(certain, jnp.inf, scores)
    scores = jnp.where(slot < held[:, None], scores, -jnp.inf)
    best = jax.lax.top_k(scores, width)[1]
    chosen = jnp.where(jnp.arange(width) < after[:, None], best, scores.shape[1])
    return jnp.minimum(jnp.sort(chosen, axis=1), scores.shape[1] - 1).astype(jnp.int32)
