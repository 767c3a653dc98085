"""The compiled programs of generation: one set for all that runs, times or compiles them.

`generate`, beam search, speculation, the benchmarks and compilation for devices that are not
attached take them from here, so that what is timed and compiled ahead of time is what users run.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.stages import Lowered
from jaxtyping import Array, Float, Int, PyTree

from fusedkv_jax.cache import KVCache, cache_shardings
from fusedkv_jax.compression.compressor import Chunk
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.generation import beam_loop, loop, rows
from fusedkv_jax.generation.chunked_prefill import (
    Prefilled,
    PrefillPlan,
    PromptArrays,
    Split,
    prompt_chunks,
    run_chunks,
)
from fusedkv_jax.generation.compressed_prefill import run_compressed
from fusedkv_jax.generation.logprobs import Logprobs
from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.generation.placement import Placement
from fusedkv_jax.generation.sampling import SamplerInputs
from fusedkv_jax.generation.settings import EngineSettings
from fusedkv_jax.generation.steps import extend
from fusedkv_jax.model import Decoder, fold_fusion, for_decoding
from fusedkv_jax.model.structure import split_for_calls
from fusedkv_jax.sharding import batch_sharding, serving_shardings, spec

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class GenerationPrograms:
    """The programs of one model, under the mesh that it runs on.

    Attributes:
        model: the model, its fusion folded; see `of` and `abstract`.
        settings: how it is run.
        is_abstract: the model has shapes alone; its programs can be lowered, not run.
    """

    model: Decoder
    settings: EngineSettings = EngineSettings()
    is_abstract: bool = False

    @classmethod
    def of(cls, model: Decoder, settings: EngineSettings | None = None) -> GenerationPrograms:
        """Those of a model, by default with the default settings."""
        return cls(fold_fusion(model), settings or EngineSettings())

    @classmethod
    def abstract(cls, config: ModelConfig, mesh: Mesh | None = None) -> GenerationPrograms:
        """Those of an abstract model, on devices that may be compile-only.

        They are the programs of accelerators: on a CPU `generate` unrolls large layers.
        """
        model = nnx.eval_shape(lambda: fold_fusion(Decoder(config, rngs=nnx.Rngs(0))))
        return cls(model, EngineSettings(mesh=mesh), is_abstract=True)

    @functools.cached_property
    def placement(self) -> Placement:
        """Where they run."""
        return Placement.of(self.settings.mesh)

    @functools.cached_property
    def split(self) -> Split:
        """Structure and parameters of the model, in its form for decoding."""
        if not self.is_abstract:
            graph, params = split_for_calls(for_decoding(self.model))
            return graph, self.placement.parameters(params)
        graph, params = nnx.split(self.model)
        mesh = self.placement.mesh
        return graph, _placed(params, mesh and serving_shardings(params, mesh))

    def empty_cache(self, batch_size: int, length: int) -> KVCache:
        """A cache of `length` tokens a row."""
        with self.placement.active():
            return self.placement.cache(
                self.model.config,
                batch_size=batch_size,
                max_length=length,
                dtype=self.settings.cache_dtype,
            )

    def prefill(self, prompts: PromptArrays, cache: KVCache, plan: PrefillPlan) -> Prefilled:
        """Run prompts. The cache is donated, unless a compressor runs them at once."""
        compression = self.settings.compression
        with self.placement.active():
            if compression is None:
                return run_chunks(self.split, prompts, cache, plan)
            length = prompts.tokens.shape[1]
            width = max(plan.width or length, compression.least_chunk or length)
            chunks = [Chunk(*chunk, length) for chunk in prompt_chunks(prompts, width)]
            config = self.model.config
            return Prefilled(*run_compressed(self.split, config, compression, chunks, cache))

    def repeat_rows(
        self, cache: KVCache, logits: Array | None, index: np.ndarray
    ) -> tuple[KVCache, Array | None]:
        """Rows of a cache and of the logits that follow it, by their numbers."""
        with self.placement.active():
            return rows.repeat_rows(cache, logits, jnp.asarray(index, jnp.int32))

    def begin(
        self,
        logits: Float[Array, "B V"],
        tokens: Int[Array, "B C"],
        bounds: loop.Bounds,
        cache: KVCache,
        inputs: SamplerInputs,
        logprobs: Logprobs | None = None,
    ) -> loop.DecodeState:
        """Each row's first token; arguments as for `loop.begin`."""
        with self.placement.active():
            return loop.begin(logits, tokens, bounds, cache, inputs, logprobs)

    def decode(
        self,
        state: loop.DecodeState,
        inputs: SamplerInputs,
        steps: Int[Array, ""] | int | None = None,
    ) -> loop.DecodeState:
        """Decode until every row has ended, or for `steps` steps. The state is donated."""
        speculation = self.settings.speculation
        decode = loop.decode if speculation is None else speculation.decode
        with self.placement.active():
            return decode(*self.split, state, inputs, steps)

    def search(
        self,
        logits: Float[Array, "R V"],
        cache: KVCache,
        limits: beam_loop.Limits,
        sizes: beam_loop.Sizes,
    ) -> beam_loop.Beams:
        """Beam search from the logits of prefill; arguments as for `beam_loop.search`."""
        with self.placement.active():
            return beam_loop.search(*self.split, logits, cache, limits, sizes)

    def lower_prefill(self, batch_size: int, length: int) -> Lowered:
        """The program that reads prompts of `length` tokens, ready to `compile()`."""
        mesh = self.placement.mesh
        tokens = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
        tokens = _placed(tokens, mesh and batch_sharding(mesh))
        count = self._rows(jax.ShapeDtypeStruct((batch_size,), jnp.int32))
        cache = self.cache_shapes(batch_size, length)
        with self.placement.active():
            return extend.lower(*self.split, tokens, count, cache)

    def lower_decode(self, batch_size: int, length: int) -> Lowered:
        """The decode loop over caches of `length` tokens, ready to `compile()`."""

        def start() -> loop.DecodeState:
            ones = jnp.ones(batch_size, jnp.int32)
            buffer = jnp.zeros((batch_size, length), jnp.int32)
            bounds = loop.Bounds(ones, ones, jnp.zeros((batch_size, 4), jnp.int32))
            vocab_size = self.model.config.vocab_size
            return loop.DecodeState.create(buffer, bounds, None, vocab_size)

        state = self._rows(jax.eval_shape(start))
        state = dataclasses.replace(state, cache=self.cache_shapes(batch_size, length))
        params = [SamplingParams()] * batch_size
        # Without a sharding, as a batch hands them over from the host: given one, even replicated,
        # the partitioner gathers them in every step.
        inputs = jax.eval_shape(lambda: SamplerInputs.create(params))
        with self.placement.active():
            return loop.decode.lower(*self.split, state, inputs)

    def cache_shapes(self, batch_size: int, length: int) -> KVCache:
        """Shapes, dtypes and shardings of a cache."""
        create = functools.partial(
            KVCache.create,
            self.model.config,
            batch_size=batch_size,
            max_length=length,
            dtype=self.settings.cache_dtype,
        )
        mesh = self.placement.mesh
        with self.placement.active():  # the storage suits the device that is compiled for
            shapes = jax.eval_shape(create)
        return _placed(shapes, mesh and cache_shardings(shapes, mesh))

    def _rows(self, tree: Tree) -> Tree:
        """Shapes with one row for each sequence, split as the batch is."""
        mesh = self.placement.mesh
        if mesh is None:
            return tree

        def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            axes = ("batch", *(None,) * (len(leaf.shape) - 1))
            return _placed(leaf, NamedSharding(mesh, spec(axes, leaf.shape, mesh)))

        return jax.tree.map(place, tree)


def _placed(shapes: Tree, shardings: PyTree) -> Tree:
    """Shapes that lie somewhere; as they are if that is None."""
    if shardings is None:
        return shapes

    def place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings)
