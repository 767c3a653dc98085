"""Double Sparsity: a few channels of every key tell which few tokens a query reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache import KVCache, Store
from fusedkv_jax.cache.cache import unstacked
from fusedkv_jax.cache.calls import Call, Piece, Reading, Rows, View
from fusedkv_jax.cache.plan import Group
from fusedkv_jax.cache.storage import Slot, Tree
from fusedkv_jax.cache.stores import LinearStore, storage_of
from fusedkv_jax.compression.compressor import (
    Chunk,
    CompressionError,
    Compressor,
    Observed,
    check_choice,
    check_count,
)
from fusedkv_jax.compression.labels import Labels, label_scores
from fusedkv_jax.compression.token_sets import merged, read_keys, readers, storages, token_sets
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind, KVLayout
from fusedkv_jax.model import Decoder
from pallas_kernels import Quantized

Mode = Literal["qk", "q", "k"]
Channels = tuple[tuple[tuple[int, ...], ...], ...]

_ROWS = 64  # last queries of a prompt that calibrate where nothing else has


@dataclass(frozen=True)
class DoubleSparsity(Compressor):
    """Decode steps read the `budget` tokens that matter most to the query (arXiv 2408.07092).

    Tokens are scored by a `group_factor`-th of the channels of every key, held in 4 bits beside
    the cache, which stays whole: this saves reading, not memory. Prompts are read in full.
    Streams stay dense if one of the first `dense_layers` layers reads them, or a layer that fuses
    several. Which channels: those of `calibrate`, otherwise those of the prompt itself.

    Attributes:
        budget: tokens that a query reads.
        group_factor: channels of a key for each one of its label.
        dense_layers: first layers, which read everything.
        mode: channels are ranked by the mean of |q k|, |q| or |k| over all pairs of tokens.
        channels: by stream and KV head, from `calibrate`.

    Raises:
        CompressionError: a field is out of range.
    """

    budget: int = 256
    group_factor: int = 4
    dense_layers: int = 2
    mode: Mode = "qk"
    channels: Channels | None = None

    title: ClassVar[str] = "Double Sparsity"
    rewinds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count(self, "budget", "group_factor")
        check_count(self, "dense_layers", least=0)
        check_choice(self, "mode", get_args(Mode))
        if self.channels is not None and not _are_indices(self.channels):
            raise CompressionError(
                f"Double Sparsity: channels={self.channels!r}; use what `calibrate` returns"
            )

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        if config.channels % (2 * self.group_factor):
            raise CompressionError(
                f"Double Sparsity: group_factor={self.group_factor} does not give an even number"
                f" of channels of head_dim={config.channels}; use a divisor of half of it"
            )
        if not self.sparse(config.kv_layout):
            raise CompressionError(
                f"Double Sparsity: every stream is windowed, fused, or read by one of the first"
                f" dense_layers={self.dense_layers} layers, so all reading would stay dense; lower"
                " dense_layers or use another compressor"
            )
        shape = np.shape(self.channels) if self.channels is not None else None
        expected = (
            len(self._group(config.kv_layout).keys),
            config.kv_heads,
            config.channels // self.group_factor,
        )
        if shape not in (None, expected):
            raise CompressionError(
                f"Double Sparsity: channels have shape {shape}, this model needs {expected};"
                " calibrate with this model"
            )
        outside = [c for c in np.ravel(self.channels or ()) if not 0 <= c < config.channels]
        if outside:
            raise CompressionError(
                f"Double Sparsity: channels name channel {outside[0]} of a key of"
                f" {config.channels}; calibrate with this model"
            )

    def sparse(self, layout: KVLayout) -> tuple[Group, ...]:
        """Streams whose readers read few of their tokens."""

        def allowed(group: Group) -> bool:
            layers = readers(layout, group)
            fused = any(layout.layers[i].key.is_fused for i in layers)
            windowed = any(layout.layers[i].window is not None for i in layers)
            return min(layers) >= self.dense_layers and not fused and not windowed

        return tuple(group for group in token_sets(layout) if allowed(group))

    def _group(self, layout: KVLayout) -> Group:
        """All sparse streams as one group."""
        found = self.sparse(layout)
        keys, values = (sorted(i for g in found for i in g.layers(kind)) for kind in KINDS)
        return Group(None, tuple(keys), tuple(values))

    def compress(
        self, model: Decoder, chunk: Chunk, cache: KVCache, observed: Observed
    ) -> tuple[Float[Array, "B V"], KVCache]:
        capacity, layout = cache.capacity, model.config.kv_layout
        if capacity is None or self.budget >= capacity:
            return super().compress(model, chunk, cache, observed)
        group = self._group(layout)
        if self.channels is None:
            end = cache.lengths + chunk.count
            watch = functools.partial(self.importance, lengths=end)
            tokens, rows = (chunk.tokens, chunk.count), min(_ROWS, chunk.width)
            logits, cache, found = model.observe(*tokens, cache, watch, rows=rows)
            channels = self._best(layout, group, found)
        else:
            logits, cache = super().compress(model, chunk, cache, observed)
            fixed = jnp.asarray(self.channels, jnp.int32)
            shape = (fixed.shape[0], len(chunk.count), *fixed.shape[1:])
            channels = jnp.broadcast_to(fixed[:, None], shape)
        found = storages(cache, group)
        keys = found["key"]
        plain = keys.dequantize() if isinstance(keys, Quantized) else keys
        labels = Labels.of(plain, channels)
        full = next(group for group in cache.plan.groups if group.window is None)
        groups = [group]
        stores: list[LinearStore] = [LabelStore(keys, found["value"], None, labels, self.budget)]
        keys, values = (
            tuple(i for i in full.layers(kind) if i not in group.layers(kind)) for kind in KINDS
        )
        if keys:
            groups.append(Group(None, keys, values))
            rest = storages(cache, groups[1])
            stores.append(LinearStore(rest["key"], rest["value"]))
        return logits, merged(cache, groups, stores)

    def importance(self, reading: Reading, lengths: Int[Array, "B"]) -> Float[Array, "B K H"]:
        """Mean of |q k|, |q| or |k| of every channel, over the queries and keys of one layer."""
        keys = jnp.abs(read_keys(reading).astype(jnp.float32))
        q = jnp.abs(reading.q.astype(jnp.float32))
        q = q.reshape(*q.shape[:2], keys.shape[2], -1, q.shape[3]).mean(3)
        # |q k| of a pair of tokens is |q| |k|, so its mean over all pairs is a product of means.
        slot, column = jnp.arange(keys.shape[1]), reading.rows.positions
        present = (slot < lengths[:, None])[..., None, None]
        asked = (column < lengths[:, None])[..., None, None]
        factors = {
            "q": q.mean(1, where=asked),
            "k": keys.mean(1, where=present),
        }
        return functools.reduce(jnp.multiply, (factors[part] for part in self.mode))

    def _best(
        self, layout: KVLayout, group: Group, found: Sequence[Array]
    ) -> Int[Array, "P B K c"]:
        """The most important channels of every key stream, for all layers that read it."""
        channels = []
        for layer in group.keys:
            score = sum(found[i] for i in layout.readers("key", layer))
            assert not isinstance(score, int)
            best = jax.lax.top_k(score, score.shape[-1] // self.group_factor)[1]
            channels.append(jnp.sort(best, axis=-1))
        return jnp.stack(channels).astype(jnp.int32)

    def calibrate(self, model: Decoder, tokens: Int[Array, "B T"]) -> DoubleSparsity:
        """The same with channels chosen on a text.

        Args:
            model: the model that will be used.
            tokens: int32 texts, without padding.

        Raises:
            CompressionError: the model cannot use this compressor.
        """
        self.check(model.config)
        channels = _calibrated(*nnx.split(model), dataclasses.replace(self, channels=None), tokens)
        fixed = tuple(tuple(map(tuple, heads)) for heads in np.asarray(channels).tolist())
        return dataclasses.replace(self, channels=fixed)


@functools.partial(jax.jit, static_argnames=("graph", "compressor"))
def _calibrated(
    graph: nnx.GraphDef[Decoder],
    params: nnx.State,
    compressor: DoubleSparsity,
    tokens: Int[Array, "B T"],
) -> Int[Array, "P K c"]:
    model = nnx.merge(graph, params)
    layout = model.config.kv_layout
    batch, length = tokens.shape
    count = jnp.full(batch, length, jnp.int32)
    cache = unstacked(KVCache.create(model.config, batch_size=batch, max_length=length))
    watch = functools.partial(compressor.importance, lengths=count)
    _, _, found = model.observe(tokens, count, cache, watch, rows=length)
    mean = [x.mean(0, keepdims=True) for x in found]
    return compressor._best(layout, compressor._group(layout), mean)[:, 0]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "dropped", "labels"],
    meta_fields=["budget"],
)
@dataclass(frozen=True)
class LabelStore(LinearStore):
    """All tokens, and labels by which single queries choose those that they read.

    Attributes:
        labels: of all keys.
        budget: tokens that a query reads.
    """

    labels: Labels | None = None
    budget: int = 0

    rewinds: ClassVar[bool] = False  # tokens that come together read everything

    def write(self, kind: Kind, slot: Slot, new: Float[Array, "B T K H"], call: Call) -> Store:
        store = self
        if kind == "key" and self.labels is not None:
            labels = self.labels.write(slot, new, call.first, call.count)
            store = dataclasses.replace(self, labels=labels)
        return super(LabelStore, store).write(kind, slot, new, call)

    def view(self, kind: Kind, slot: Slot, new: Array | None, call: Call) -> View:
        if call.length > 1:
            return super().view(kind, slot, new, call)
        # Not the stream itself: reading it would cost what is to be saved.
        labels = self.labels.select(slot) if self.labels and kind == "key" else None
        return storage_of(self, kind), slot, labels

    def pieces(
        self,
        keys: tuple[View, ...],
        values: tuple[View, ...],
        q: Float[Array, "B t N H"],
        rows: Rows,
        call: Call,
    ) -> tuple[Piece, ...]:
        if call.length > 1:
            return super().pieces(keys, values, q, rows, call)
        end = call.first + call.count
        score = label_scores(keys[0][2], q[:, 0])
        present = (jnp.arange(score.shape[2]) < end[:, None])[:, None]
        index = jax.lax.top_k(jnp.where(present, score, -jnp.inf), self.budget)[1]
        chosen = [
            tuple(_tokens(storage, slot, index) for storage, slot, _ in views)
            for views in (keys, values)
        ]
        held = jnp.minimum(end, self.budget)  # what is absent scores least, so it comes last
        return (Piece(chosen[0], chosen[1], {"causal": False, "kv_lengths": held}),)


def _are_indices(channels: Channels) -> bool:
    """Whether these are indices of three axes, as `calibrate` returns."""
    try:
        array = np.asarray(channels)
    except ValueError:  # ragged
        return False
    return array.ndim == 3 and np.issubdtype(array.dtype, np.integer)


def _tokens(storage: Tree, slot: Slot, index: Int[Array, "B K C"]) -> Tree:
    """Some tokens of each KV head of one stream, [B, C, K, H]."""
    batch, heads, _ = index.shape
    rows, places = jnp.arange(batch)[:, None, None], index.swapaxes(1, 2)
    return jax.tree.map(lambda array: array[slot, rows, places, jnp.arange(heads)], storage)
