"""The decoder language model: embedding, runs of layers, final norm, output head."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache import KVCache
from fusedkv_jax.config import ConfigError, ModelConfig
from fusedkv_jax.layouts import Run, runs
from fusedkv_jax.model.block import Block
from fusedkv_jax.model.layers import RMSNorm
from fusedkv_jax.model.memory import CacheMemory, Memory
from fusedkv_jax.model.mixing import Mixing
from fusedkv_jax.model.parameters import Initializer
from fusedkv_jax.model.projection import project
from fusedkv_jax.model.rotary import Rotation, rotation
from fusedkv_jax.model.stack import Queries, Stack
from pallas_kernels import implementations

Rows = Literal["last", "all", "none"]


class Decoder(nnx.Module):
    """A decoder-only language model of any layout and head geometry.

    `nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))` builds it without arrays.

    Args:
        config: the model's configuration.
        rngs: its `params` stream draws the initial parameters.

    Raises:
        ConfigError: `config.attention` names no implementation.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        if config.attention not in ("auto", *implementations()):
            names = ", ".join(("auto", *implementations()))
            raise ConfigError(f"attention={config.attention!r}; choose {names}")
        self.config = config
        init = Initializer(config)
        self.embedding = init.matrix(config.vocab_size, config.d_model)
        self.runs = nnx.List([nnx.List(_blocks(init, run)) for run in runs(config.kv_layout)])
        self.mixing = Mixing(init)
        self.final_norm = RMSNorm(init, config.d_model)
        untied = not config.tie_embeddings
        self.head = init.matrix(config.d_model, config.vocab_size) if untied else None
        init.fill(rngs)

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
        """
        graph, state = nnx.split(self)
        return _forward(graph, state, tokens, segment_ids, positions)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states, after the last norm: what `logits` takes."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self._embed(tokens)
        memory = Memory(self.config, tokens.shape, segment_ids)
        queries = Queries(self._rotation(positions))
        state = memory.start(x.dtype)
        x, _ = self._stack(memory)(x, state, queries, 0, self.config.num_layers)
        return self.final_norm(x)

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Output head, accumulated and returned in float32."""
        head = self.embedding[...].T if self.head is None else self.head[...]
        return project(x, head.astype(x.dtype), 1, jnp.float32)

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
            Logits in float32 (undefined for padding), or None; and the extended cache.
        """
        config, depth = self.config, self.config.kv_layout.prefill_depth
        memory = CacheMemory(config, cache, tokens.shape, count)
        stack = self._stack(memory)
        x = self._embed(tokens)
        queries = Queries(self._rotation(memory.positions))
        x, state = stack(x, memory.start(x.dtype), queries, 0, depth)
        if rows == "none":
            return None, memory.finish(state)
        if rows == "last" and tokens.shape[1] > 1:
            last = jnp.maximum(count - 1, 0)[:, None]
            x = jnp.take_along_axis(x, last[:, :, None], axis=1)
            positions = cache.lengths[:, None] + last
            queries = Queries(self._rotation(positions), positions)
        x, state = stack(x, state, queries, depth, config.num_layers)
        logits = self.logits(self.final_norm(x))
        return (logits[:, 0] if rows == "last" else logits), memory.finish(state)

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.embedding[...][tokens].astype(self.config.dtype)

    def _rotation(self, positions: Int[Array, "B T"]) -> Rotation:
        mla = self.config.mla
        channels = self.config.channels if mla is None else mla.rope_dim
        return rotation(self.config.rope, channels, positions)

    def _stack(self, memory: Memory) -> Stack:
        blocks = [[nnx.split(block) for block in run] for run in self.runs]
        return Stack(self.config, blocks, self.mixing(), memory)


def _blocks(init: Initializer, run: Run) -> list[Block]:
    """One block per place of a run's body, the parameters of all repeats stacked."""
    layers = init.config.kv_layout.layers
    stacked = dataclasses.replace(init, stack=(run.repeats,))
    return [Block(stacked, layers[run.start + p]) for p in range(run.period)]


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph: nnx.GraphDef[Decoder], state: Any, tokens, segment_ids, positions) -> Array:
    model = nnx.merge(graph, state)
    return model.logits(model.hidden(tokens, segment_ids, positions))
