"""Runs planned steps over slots: the rows of one contiguous cache, as `generate` has it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from fusedkv_jax.cache import KVCache
from fusedkv_jax.generation.logprobs import Logprobs, score
from fusedkv_jax.generation.rows import cut_row, put_row
from fusedkv_jax.model import Decoder
from fusedkv_jax.serving.cache_form import CacheForm
from fusedkv_jax.serving.draws import TokenDraw
from fusedkv_jax.serving.plan import StepPlan
from fusedkv_jax.serving.request import Request
from fusedkv_jax.serving.runner import PromptScores, Runner, RunningStep
from fusedkv_jax.serving.scoring import is_scored
from fusedkv_jax.serving.settings import ServingSettings
from fusedkv_jax.serving.shapes import powers
from fusedkv_jax.serving.stand_ins import put_in

SHORTEST_CHUNK = 16


class Slots(NamedTuple):
    """The caches of all requests.

    Attributes:
        cache: a row for each slot; how long each is, the host says in every step.
        logits: of the last token that has passed in each slot, float32 [slots, V].
    """

    cache: KVCache
    logits: Float[Array, "B V"]


class SlotChunk(NamedTuple):
    """Tokens of one request that pass together, as arrays.

    Attributes:
        slot: int32 number of its slot.
        start: int32 number of tokens before them.
        count: int32 number of them.
        tokens: int32, padded, [T].
        targets: int32 tokens that follow each in the prompt, for scores, [T].
    """

    slot: np.ndarray
    start: np.ndarray
    count: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray


@functools.partial(jax.jit, static_argnames=("graph", "rows"), donate_argnames="slots")
def run_chunk(
    graph: nnx.GraphDef[Decoder],
    params: PyTree,
    slots: Slots,
    chunk: SlotChunk,
    rows: Literal["last", "none"],
) -> Slots:
    """Add tokens of a prompt; the layers above run for the last, or for none."""
    row = _row(slots.cache, chunk)
    arrays = jnp.asarray(chunk.tokens)[None], jnp.asarray(chunk.count)[None]
    logits, row = nnx.merge(graph, params).extend(*arrays, row, rows)
    return _with_row(slots, chunk, row, logits)


@functools.partial(jax.jit, static_argnames=("graph", "k"), donate_argnames="slots")
def run_scored_chunk(
    graph: nnx.GraphDef[Decoder], params: PyTree, slots: Slots, chunk: SlotChunk, k: int
) -> tuple[Logprobs, Slots]:
    """Add tokens of a prompt, all through all layers, and score what follows each."""
    row = _row(slots.cache, chunk)
    arrays = jnp.asarray(chunk.tokens)[None], jnp.asarray(chunk.count)[None]
    logits, row = nnx.merge(graph, params).extend(*arrays, row, "all")
    assert logits is not None
    last = jax.lax.dynamic_index_in_dim(logits, chunk.count - 1, 1, keepdims=False)
    scores = score(logits[0], jnp.asarray(chunk.targets), k)
    return scores, _with_row(slots, chunk, row, last)


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="slots")
def run_decodes(
    graph: nnx.GraphDef[Decoder],
    params: PyTree,
    slots: Slots,
    latest: Int[Array, "room"],
    tokens: Int[Array, "B"],
    starts: Int[Array, "B"],
    counts: Int[Array, "B"],
) -> Slots:
    """Add a token to each slot whose count is 1, or what the step before has drawn for a stand-in;
    the others stay as they are."""
    tokens = put_in(tokens, latest)
    cache = dataclasses.replace(slots.cache, lengths=starts)
    logits, cache = nnx.merge(graph, params).extend(tokens[:, None], counts, cache)
    assert logits is not None
    return Slots(cache, jnp.where(counts[:, None] > 0, logits, slots.logits))


def _row(cache: KVCache, chunk: SlotChunk) -> KVCache:
    """The row of a slot; empty where a request begins, as another may have left NaN there."""
    row = cut_row(cache, jnp.asarray(chunk.slot))
    row = jax.tree.map(lambda x: jnp.where(chunk.start == 0, jnp.zeros_like(x), x), row)
    return dataclasses.replace(row, lengths=jnp.asarray(chunk.start)[None])


def _with_row(slots: Slots, chunk: SlotChunk, row: KVCache, logits: Array | None) -> Slots:
    """With a row and, unless they are None, its logits [1, V]."""
    held = slots.logits
    if logits is not None:
        held = jax.lax.dynamic_update_slice_in_dim(held, logits, chunk.slot, 0)
    return Slots(put_row(slots.cache, jnp.asarray(chunk.slot), row), held)


@functools.partial(jax.jit, donate_argnames="slots")
def _copy(slots: Slots, source: Int[Array, ""], target: Int[Array, ""]) -> Slots:
    """With a slot's row in another slot as well."""
    cache = put_row(slots.cache, target, cut_row(slots.cache, source))
    return slots._replace(cache=cache)


@jax.jit
def _take(logits: Float[Array, "B V"], slots: Int[Array, "S"]) -> Float[Array, "S V"]:
    return logits[slots]


class SlotRunner(Runner):
    """Runs a model over slots: chunks of prompts one by one, then all that decode together."""

    def __init__(self, model: Decoder, settings: ServingSettings, form: CacheForm, mask_words: int):
        super().__init__(model, settings, form, mask_words)
        most = min(form.step_tokens(settings), form.max_model_len)
        self._columns = powers(min(SHORTEST_CHUNK, most), most, 2)

    def _start(self, plan: StepPlan, draws: Sequence[TokenDraw]) -> RunningStep:
        for copy in plan.copies:  # for outputs of one prompt that part
            pair = np.int32(copy.source), np.int32(copy.target)
            self.pool = _copy(self._donated(), *pair)
        sampled, decoding = plan.sampled(), []
        scores: dict[int, list[PromptScores]] = {}
        for place, (request, count) in enumerate(zip(plan.requests, plan.counts, strict=True)):
            if is_scored(request):
                scores[place] = [self._score(request, count)]
            elif count == 1 and request.computed:
                decoding.append(request)
            else:
                self._extend(request, count, sampled[place])
        if decoding:
            self._decode(decoding)
        rows = [place for place, wanted in enumerate(sampled) if wanted]
        index = np.zeros(self.shapes.fit(len(rows), 0)[0], np.int32)
        index[: len(rows)] = [plan.requests[place].pages[0] for place in rows]
        self._logits = self._last = _take(self.pool.logits, index)
        self.lower_rows += plan.tokens
        self.upper_rows += sum(place not in scores for place in rows)
        return self._running(plan, draws, rows, scores)

    def _extend(self, request: Request, count: int, is_sampled: bool) -> None:
        chunk = self._chunk(request, count)
        rows: Literal["last", "none"] = "last" if is_sampled else "none"
        self.pool = run_chunk(*self._split, self._donated(), chunk, rows)

    def _score(self, request: Request, count: int) -> PromptScores:
        chunk, start = self._chunk(request, count), request.computed
        scores, self.pool = run_scored_chunk(*self._split, self._donated(), chunk, k=self._k)
        self.upper_rows += count
        followed = min(count, len(request.prompt) - 1 - start)
        return PromptScores(start, jax.tree.map(lambda x: x[:followed], jax.device_get(scores)))

    def _decode(self, requests: Sequence[Request]) -> None:
        tokens, starts, counts = np.zeros((3, self.form.count), np.int32)
        for request in requests:
            (slot,) = request.pages
            (tokens[slot],) = request.tokens(request.computed, 1)
            starts[slot], counts[slot] = request.computed, 1
        self.pool = run_decodes(*self._split, self._donated(), self._latest, tokens, starts, counts)

    def _chunk(self, request: Request, count: int) -> SlotChunk:
        """The next `count` tokens of a request."""
        chunk = _no_tokens(next(size for size in self._columns if size >= count))
        start = request.computed
        chunk.tokens[:count] = request.tokens(start, count)
        following = request.prompt[start + 1 : start + 1 + count]
        chunk.targets[: len(following)] = following
        slot, first, size = np.array([request.pages[0], start, count], np.int32)
        return chunk._replace(slot=slot, start=first, count=size)

    def _empty_pool(self) -> Slots:
        cache = KVCache.create(
            self.config,
            batch_size=self.form.count,
            max_length=self.form.size,
            dtype=self._settings.cache_dtype,
        )
        return Slots(cache, jnp.zeros((self.form.count, self.config.vocab_size), jnp.float32))

    def _warm_up(self) -> int:
        shapes = self._warm_up_prompts()
        nobody = np.zeros(self.form.count, np.int32)
        arrays = self._latest, nobody, nobody, nobody
        self.pool = run_decodes(*self._split, self._donated(), *arrays)
        self.pool = _copy(self._donated(), np.int32(0), np.int32(0))
        for size in self.shapes.decode_rows:
            self._warm_up_draws(_take(self.pool.logits, np.zeros(size, np.int32)))
        return shapes + 1

    def _warm_up_prompts(self) -> int:
        """Compile what prompts run in; the number of shapes."""
        kinds: tuple[Literal["last", "none"], ...] = ("last", "none")
        for columns in self._columns:
            chunk = _no_tokens(columns)
            for rows in kinds:
                self.pool = run_chunk(*self._split, self._donated(), chunk, rows)
            _, self.pool = run_scored_chunk(*self._split, self._donated(), chunk, k=self._k)
        return len(self._columns)


def _no_tokens(columns: int) -> SlotChunk:
    """Arrays of this shape without a token, to be filled or to compile what takes them."""
    zero = np.zeros((), np.int32)
    return SlotChunk(zero, zero, zero, *np.zeros((2, columns), np.int32))
