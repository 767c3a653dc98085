"""The decoder language model: embedding, runs of layers, final norm, output head."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree

from fusedkv_jax.cache import KVCache
from fusedkv_jax.cache.calls import Call
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import Run, runs
from fusedkv_jax.model.block import Block
from fusedkv_jax.model.checks import check_integers, check_tokens
from fusedkv_jax.model.layers import make_norm
from fusedkv_jax.model.mixing import FusionWeights
from fusedkv_jax.model.parameters import Initializer
from fusedkv_jax.model.projection import project
from fusedkv_jax.model.rotary import rotation
from fusedkv_jax.model.stack import Angles, Layers, Options, Queries, Walked, Watch, run_layers
from fusedkv_jax.model.streams import Streams
from fusedkv_jax.sharding import active_mesh, automatic, constrain, spec
from fusedkv_jax.validation import check_kind

Rows = Literal["last", "all", "none"]


class Decoder(nnx.Module):
    """A decoder-only language model of any layout and head geometry.

    `nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))` builds it without arrays.

    Args:
        config: the model's configuration.
        rngs: its `params` stream draws the initial parameters.

    Raises:
        ValueError: an argument of another kind.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        check_kind("config", config, ModelConfig, "a ModelConfig, such as presets.get('332m')")
        check_kind("rngs", rngs, nnx.Rngs, "nnx.Rngs(seed)")
        self.config = config
        init = Initializer(config)
        self.embedding = init.matrix(config.vocab_size, config.d_model)
        self.runs: nnx.List = nnx.List(
            [nnx.List(_blocks(init, run)) for run in runs(config.kv_layout)]
        )
        self.mixing = FusionWeights(init)
        self.final_norm = make_norm(init, config.d_model)
        untied = not config.tie_embeddings
        self.head = init.matrix(config.d_model, config.vocab_size) if untied else None
        init.fill(rngs)  # together: compiling a draw for each parameter would take longest

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Next-token logits of whole sequences.

        Args:
            tokens: int32 token ids.
            segment_ids: int32 document of each token: tokens attend within their own only.
                Negative is padding.
            positions: int32 positions for the rotary embedding; by default 0, 1, ... in each row.

        Returns:
            Logits in float32.

        Raises:
            ValueError: an id outside the vocabulary, unless the call is inside `jax.jit`.
        """
        check_integers("tokens", tokens, "B T")
        check_tokens(tokens, self.config.vocab_size)
        graph, state = nnx.split(self)
        mesh = active_mesh()
        axes, shape = ("batch", "sequence", "vocabulary"), (*tokens.shape, self.config.vocab_size)
        out_spec = P() if mesh is None else spec(axes, shape, mesh)
        return _forward(graph, out_spec, state, tokens, segment_ids, positions)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states, after the last norm: what `logits` takes."""
        return self.normed(self._whole(tokens, segment_ids, positions, Options()).x)

    def layer_outputs(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        kept: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "L B T D"]:
        """What every layer gives, before the final norm: for losses of early exits.

        Args:
            tokens: as for a call of the model, like the next two.
            segment_ids: document of each token.
            positions: place of each token in its document.
            kept: rows that each layer changes; it passes the others on as they are.
        """
        options = Options(kept=kept, collects=True)
        return jnp.concatenate(self._whole(tokens, segment_ids, positions, options).outputs)

    def _whole(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        positions: Int[Array, "B T"] | None,
        options: Options,
    ) -> Walked:
        """Whole sequences through all layers."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        streams = Streams.of_sequence(self.config, tokens.shape, segment_ids)
        queries = Queries(self.rotation(positions))
        return run_layers(self.layers(), self.embed(tokens), streams, queries, None, options)

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Output head, accumulated and returned in float32."""
        logits, cap = project(x, self.head_matrix, 1, jnp.float32), self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def normed(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """What the output head takes, from the last layer's output."""
        normed, scale = self.final_norm(x), self.config.logit_scale
        return normed if scale == 1 else normed * scale

    @property
    def head_matrix(self) -> Float[Array, "D V"]:
        """What final hidden states are multiplied with; the transposed embedding where tied."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def extend(
        self,
        tokens: Int[Array, "B T"],
        count: Int[Array, "B"],
        cache: KVCache,
        rows: Rows = "last",
    ) -> tuple[Array | None, KVCache]:
        """Add new tokens to a cache; prefill, chunked prefill and decoding are all this.

        Tokens pass through the layers that cache something (`prefill_depth`). The layers above
        them run for the rows whose logits are wanted only.

        Args:
            tokens: int32 new tokens, right-padded.
            count: int32 number of new tokens in each row, 0 to T.
            cache: the cache, with room for the new tokens.
            rows: logits of the `last` new token [B, V], of `all` [B, T, V], or `none`.

        Returns:
            Logits in float32 (undefined for padding), or None; and the extended cache. Rows
            that were given what they cannot hold have NaN logits from then on, as
            `KVCache.overflowed` tells.

        Raises:
            ValueError: a cache of another layout, shape or batch size.
        """
        width = {"last": 1, "all": tokens.shape[1], "none": 0}[rows]
        logits, cache, _ = self._extend(tokens, count, cache, width)
        return (logits[:, -1] if rows == "last" and logits is not None else logits), cache

    def observe(
        self,
        tokens: Int[Array, "B T"],
        count: Int[Array, "B"],
        cache: KVCache,
        watch: Watch,
        rows: int = 1,
    ) -> tuple[Float[Array, "B V"], KVCache, tuple[PyTree, ...]]:
        """Add new tokens to a cache and look at what each layer reads.

        Args:
            tokens: int32 new tokens, right-padded.
            count: int32 number of new tokens in each row, 1 to T.
            cache: the cache, with room for the new tokens.
            watch: called in every layer after its attention; gives arrays, or None.
            rows: how many of each row's last tokens pass through the layers above
                `prefill_depth`. A row with fewer tokens repeats its first one.

        Returns:
            Logits of each row's last token in float32, the extended cache, and what `watch` gave
            for each layer.
        """
        logits, cache, found = self._extend(tokens, count, cache, rows, watch)
        assert logits is not None
        return logits[:, -1], cache, tuple(found[i] for i in range(self.config.num_layers))

    def _extend(
        self,
        tokens: Int[Array, "B T"],
        count: Int[Array, "B"],
        cache: KVCache,
        rows: int,
        watch: Watch | None = None,
    ) -> tuple[Array | None, KVCache, dict[int, PyTree]]:
        """Logits of all tokens, or of the last `rows` of each row where those are fewer."""
        config, depth = self.config, self.config.kv_layout.prefill_depth
        cache.check(config, tokens.shape[0])
        call = Call(cache.lengths, count, tokens.shape[1])
        streams = Streams.of_cache(config, cache, call)
        layers, options = self.layers(), Options(watch=watch)
        positions = call.positions
        queries = Queries(self.rotation(positions), positions)
        x = self.embed(tokens)
        # Up to the last layer that caches something all tokens have to pass; above it nothing is
        # kept, so only the rows that are asked for do.
        x, streams, seen, _ = run_layers(layers, x, streams, queries, (0, depth), options)
        valid = valid_rows(tokens, count, config.vocab_size)
        if not rows:
            return None, streams.close().advanced(valid), seen
        if rows < tokens.shape[1]:
            last = jnp.maximum(count[:, None] + jnp.arange(-rows, 0), 0)
            x = jnp.take_along_axis(x, last[:, :, None], axis=1)
            positions = cache.lengths[:, None] + last
            queries = Queries(self.rotation(positions), positions)
        upper = depth, config.num_layers
        x, streams, above, _ = run_layers(layers, x, streams, queries, upper, options)
        if watch is not None:
            x = x[:, -1:] if rows < tokens.shape[1] else _last(x, count)
        cache = streams.close().advanced(valid)
        # Nobody can be told of an error in a compiled program, but NaN is hard to overlook.
        x = jnp.where(cache.overflowed[:, None, None], jnp.nan, x)
        return self.logits(self.normed(x)), cache, seen | above

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What enters the first layer."""
        table = constrain(self.embedding[...], "vocabulary", None)
        x = table[tokens].astype(self.config.dtype)
        if self.config.embedding_scale != 1:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        return constrain(x, "batch", "sequence", None)

    def rotation(self, positions: Int[Array, "B T"]) -> Angles:
        """Rotary angles of tokens at these positions; of all kinds, stacked, if there are more."""
        channels = self.config.geometry.rotary
        kinds = [rotation(rope, channels, positions) for rope in self.config.rope_kinds]
        if len(kinds) == 1:
            return kinds[0]
        cos, sin = zip(*kinds, strict=True)
        return jnp.stack(cos), jnp.stack(sin)

    def layers(self) -> Layers:
        """The layers, for `run_layers`."""
        blocks = [[_split(block) for block in run] for run in self.runs]
        graphs, params = ([[part[i] for part in run] for run in blocks] for i in (0, 1))
        return Layers(self.config, graphs, params, self.mixing())


def _split(block: Block | nnx.List) -> tuple[nnx.GraphDef[Block], PyTree]:
    """Structure and parameters of equal layers, the latter stacked, or a tuple if unrolled."""
    if not isinstance(block, nnx.List):
        return nnx.split(block)
    graphs, params = zip(*(nnx.split(layer) for layer in block), strict=True)
    return graphs[0], params


def valid_rows(
    tokens: Int[Array, "B T"], count: Int[Array, "B"], vocab_size: int
) -> Bool[Array, "B"]:
    """Rows of new tokens that can be: 0 to T of them, all in the vocabulary."""
    length = tokens.shape[1]
    padding = jnp.arange(length) >= count[:, None]
    inside = jnp.all(padding | ((tokens >= 0) & (tokens < vocab_size)), axis=1)
    return inside & (count >= 0) & (count <= length)


def _last(x: Float[Array, "B T D"], count: Int[Array, "B"]) -> Float[Array, "B 1 D"]:
    return jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)


def _blocks(init: Initializer, run: Run) -> list[Block]:
    """One block per place of a run's body, the parameters of all repeats stacked."""
    layers = init.config.kv_layout.layers
    stacked = dataclasses.replace(init, stack=(run.repeats,))
    return [Block(stacked, layers[run.start + p]) for p in range(run.period)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(graph: nnx.GraphDef[Decoder], out_spec: P, *arrays: PyTree) -> Array:
    def forward(
        state: nnx.State, tokens: Array, segment_ids: Array | None, positions: Array | None
    ) -> Array:
        model = nnx.merge(graph, state)
        return model.logits(model.hidden(tokens, segment_ids, positions))

    return automatic(forward, out_spec)(*arrays)
