"""Slots whose caches a compressor shrinks: prompts run whole, and leave rows of one shape."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache import KVCache
from fusedkv_jax.compression.compressor import Chunk
from fusedkv_jax.generation.chunked_prefill import PromptArrays, prompt_chunks
from fusedkv_jax.generation.compressed_prefill import run_compressed
from fusedkv_jax.generation.rows import put_row
from fusedkv_jax.model import Decoder
from fusedkv_jax.serving.cache_form import CacheForm
from fusedkv_jax.serving.compressed_rows import chunk_width, compressed_row
from fusedkv_jax.serving.request import Request
from fusedkv_jax.serving.settings import ServingSettings
from fusedkv_jax.serving.slot_runner import SlotRunner, Slots


@functools.partial(jax.jit, donate_argnames="slots")
def _insert(slots: Slots, slot: Int[Array, ""], row: KVCache, logits: Float[Array, "1 V"]) -> Slots:
    """With what a prompt has left in a slot."""
    held = jax.lax.dynamic_update_slice_in_dim(slots.logits, logits, slot, 0)
    return Slots(put_row(slots.cache, slot, row), held)


class CompressedSlotRunner(SlotRunner):
    """Runs a model over slots of compressed caches.

    Every prompt runs in arrays of `max_model_len` columns, chunk by chunk, so that what compressors
    derive from the columns, the shapes of caches among it, is the same for all.
    """

    def __init__(self, model: Decoder, settings: ServingSettings, form: CacheForm, mask_words: int):
        assert settings.compression is not None and form.max_output_len is not None
        self._compressor, self._room = settings.compression, form.max_output_len
        super().__init__(model, settings, form, mask_words)

    def _extend(self, request: Request, count: int, is_sampled: bool) -> None:
        assert not request.computed and count == len(request.prompt), "prompts come whole"
        self._fill(request.pages[0], request.prompt)

    def _fill(self, slot: int, prompt: np.ndarray) -> None:
        """Put into a slot what a prompt leaves."""
        length, settings = self.form.size, self._settings
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(prompt)] = prompt
        arrays = PromptArrays(tokens, np.array([len(prompt)], np.int32))
        width = chunk_width(self.config, self._compressor, settings, length)
        chunks = [Chunk(*chunk, length) for chunk in prompt_chunks(arrays, width)]
        cache = self._placement.cache(
            self.config,
            batch_size=1,
            max_length=length + self._room,
            dtype=settings.cache_dtype,
        )
        logits, row = run_compressed(self._split, self.config, self._compressor, chunks, cache)
        self.pool = _insert(self._donated(), np.int32(slot), row, logits)

    def _empty_pool(self) -> Slots:
        def several(leaf: jax.ShapeDtypeStruct) -> Array:
            rows = self.form.count
            shape = (rows,) if leaf.ndim == 1 else (leaf.shape[0], rows, *leaf.shape[2:])
            return jnp.zeros(shape, leaf.dtype)

        row = compressed_row(self.config, self._settings, self.form.size, self._room)
        shape = self.form.count, self.config.vocab_size
        return Slots(jax.tree.map(several, row), jnp.zeros(shape, jnp.float32))

    def _warm_up_prompts(self) -> int:
        width = chunk_width(self.config, self._compressor, self._settings, self.form.size)
        self._fill(0, np.zeros(min(2 * width, self.form.size - 1), np.int32))
        return 1
