"""Requests that are decoded together: their arrays, their prefill, and steps of all rows."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fusedkv_jax.cache import KVCache
from fusedkv_jax.generation import loop
from fusedkv_jax.generation.chunked_prefill import PrefillPlan, PromptArrays
from fusedkv_jax.generation.compile_time import compile_time
from fusedkv_jax.generation.engine import OfflineEngine
from fusedkv_jax.generation.logprobs import Logprobs
from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.generation.prefix import Prefix
from fusedkv_jax.generation.requests import PreparedRequest
from fusedkv_jax.generation.results import PlaceLogprobs
from fusedkv_jax.generation.sampling import SamplerInputs, bucket

_FULL_PATH_TOKENS = 2048  # of a chunk whose logits are all wanted: they are held at once
_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class NewTokens:
    """What one row has grown by.

    Attributes:
        row: number of the row.
        tokens: the tokens.
        logprobs: the row's arrays at their places, or None.
        ended: the row has ended with them.
    """

    row: int
    tokens: list[int]
    logprobs: Logprobs | None
    ended: bool


class Batch:
    """Requests that are prefilled and decoded together.

    Args:
        engine: the model.
        requests: the requests; each has `n` rows.
        prefix: what their prompts begin with.
        length: tokens that a row of the cache holds; by default the prefix's, or what is needed.

    Attributes:
        rows: (request, number of the output) of each row.
        prompt_logprobs: by request, where they are wanted; there once the batch has begun.
    """

    def __init__(
        self,
        engine: OfflineEngine,
        requests: Sequence[PreparedRequest],
        prefix: Prefix | None = None,
        length: int | None = None,
    ):
        self.engine, self.requests, self.prefix = engine, requests, prefix
        self.rows = [(r, i) for r in requests for i in range(r.params.n)]
        self.size = engine.buckets.rows(len(self.rows))
        longest = max(r.limit for r in requests)
        if length is None:
            length = engine.buckets.size(longest) if prefix is None else prefix.length
        self.length = length
        self.prompt_logprobs: dict[int, list[PlaceLogprobs | None]] = {}
        wanted = [r.params.logprobs for r in requests if r.params.logprobs is not None]
        self.k = _places(wanted, engine.config.vocab_size)
        self._state: loop.DecodeState | None = None
        self._inputs: SamplerInputs | None = None
        self._read = self._lengths().copy()  # tokens of each row that the host has
        self._ended = np.zeros(self.size, bool)
        self._has_been_read = False

    @property
    def finished(self) -> bool:
        """All rows have ended."""
        return bool(self._ended.all())

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache, once the batch has begun."""
        assert self._state is not None and self._state.cache is not None
        return self._state.cache.nbytes

    def step(self, tokens: int | None = None) -> list[NewTokens]:
        """Go on, and hand out what is new.

        The first step prefills, which gives each row's first token.

        Args:
            tokens: tokens of each row that a later step decodes at most (rounds of a draft and its
                verification, with speculation); None for all at once, in the first step too.
        """
        begun = self._state is not None
        if not begun:
            self._begin()
        clock, start = compile_time(), time.perf_counter()
        if begun or tokens is None:
            self._decode(tokens)
        found = self._read_new(tokens or self.length)
        rates = self.engine.rates
        rates.output_tokens += sum(len(new.tokens) for new in found)
        compiling = clock.since(start)
        rates.decode_seconds += time.perf_counter() - start - compiling
        rates.compile_seconds += compiling
        self._count_drafts()
        return found

    def end(self, rows: Sequence[int]) -> None:
        """End rows, whose texts have ended."""
        before = self.finished
        self._ended[list(rows)] = True
        if not before:
            self._count_drafts()

    def _begin(self) -> None:
        """Prefill, and each row's first token."""
        clock, start = compile_time(), time.perf_counter()
        programs = self.engine.programs
        logits, cache = self._prefill()
        self._inputs, tokens, bounds = self._arrays()
        buffers = None
        if self.k is not None:
            buffers = Logprobs.empty(self.size, self.length, self.k)
        self._state = programs.begin(logits, tokens, bounds, cache, self._inputs, buffers)
        jax.block_until_ready(self._state.lengths)
        rates = self.engine.rates
        rates.prompt_tokens += sum(len(r.prompt) for r in self.requests)
        compiling = clock.since(start)
        rates.prefill_seconds += time.perf_counter() - start - compiling
        rates.compile_seconds += compiling
        rates.first_tokens += len(self.rows)

    def _decode(self, tokens: int | None) -> None:
        assert self._state is not None and self._inputs is not None
        state = self._state
        if self._has_been_read:
            # Always, whether the host has ended rows or not: arrays from the host and from the
            # loop may lie differently on a mesh, and each kind is a program of its own.
            state = dataclasses.replace(state, finished=jnp.asarray(self._ended))
        steps = jnp.asarray(self.length if tokens is None else tokens, jnp.int32)
        # The state is donated: it is gone, and the attribute must not keep it.
        self._state = self.engine.programs.decode(state, self._inputs, steps)

    def _count_drafts(self) -> None:
        """Once all rows have ended."""
        if self.finished and self._state is not None and self._state.extra is not None:
            self.engine.rates.drafted += int(self._state.extra.drafted.sum())
            self.engine.rates.accepted += int(self._state.extra.accepted.sum())
            self._state = dataclasses.replace(self._state, extra=None)

    def _lengths(self) -> np.ndarray:
        """Prompt tokens of each row; 0 for those that only pad."""
        lengths = np.zeros(self.size, np.int32)
        lengths[: len(self.rows)] = [len(r.prompt) for r, _ in self.rows]
        return lengths

    def _arrays(self) -> tuple[SamplerInputs, Array, loop.Bounds]:
        tokens = np.zeros((self.size, self.length), np.int32)
        limits = np.zeros(self.size, np.int32)
        most = max(len(r.stops) for r in self.requests)
        stops = np.full((self.size, bucket(most)), -1, np.int32)
        params: list[SamplingParams] = [_GREEDY] * self.size
        words: list[Sequence[Sequence[int]]] = [()] * self.size
        for row, (request, number) in enumerate(self.rows):
            tokens[row, : len(request.prompt)] = request.prompt
            limits[row] = request.limit
            stops[row, : len(request.stops)] = request.stops
            params[row], words[row] = _numbered(request.params, number), request.bad_words
        bounds = loop.Bounds(*map(jnp.asarray, (self._lengths(), limits, stops)))
        return SamplerInputs.create(params, words), jnp.asarray(tokens), bounds

    def _prefill(self) -> tuple[Array, KVCache]:
        """Logits that follow each row's prompt, and the cache; one prefill for a request's rows."""
        programs, shared = self.engine.programs, self.prefix
        prompts = self._prompt_arrays(0 if shared is None else len(shared.tokens))
        rows = len(prompts.lengths)
        if shared is None:
            cache = programs.empty_cache(rows, self._capacity(prompts.tokens.shape[1]))
        else:
            cache, _ = programs.repeat_rows(shared.cache, None, np.zeros(rows))
        logits, cache, scores = programs.prefill(prompts, cache, self._plan(prompts))
        assert logits is not None
        if scores is not None:
            self._keep_scores(scores)
        if rows == self.size and all(r.params.n == 1 for r in self.requests):
            return logits, cache
        places = np.zeros(self.size, np.int32)
        counts = [r.params.n for r in self.requests]
        places[: len(self.rows)] = np.repeat(np.arange(len(self.requests)), counts)
        cache, logits = programs.repeat_rows(cache, logits, places)
        assert logits is not None
        return logits, cache

    def _capacity(self, columns: int) -> int:
        """Tokens of a row that the cache must hold; for compressors, outputs besides the prompt."""
        engine = self.engine
        if engine.settings.compression is None:
            return self.length
        outputs = max(r.limit - len(r.prompt) for r in self.requests)
        return columns + engine.buckets.size(outputs, 1)

    def _prompt_arrays(self, skip: int) -> PromptArrays:
        """The prompts after the shared prefix, one row for each request."""
        buckets = self.engine.buckets
        longest = max(len(r.prompt) for r in self.requests) - skip
        shape = buckets.rows(len(self.requests)), buckets.size(longest)
        prompts, lengths = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
        for row, request in enumerate(self.requests):
            tokens = request.prompt[skip:]
            prompts[row, : len(tokens)], lengths[row] = tokens, len(tokens)
        return PromptArrays(prompts, lengths)

    def _plan(self, prompts: PromptArrays) -> PrefillPlan:
        rows, columns = prompts.tokens.shape
        wanted = [r.params.prompt_logprobs for r in self.requests]
        scored = [count for count in wanted if count is not None]
        k = _places(scored, self.engine.config.vocab_size)
        buckets = self.engine.buckets
        if k is not None:
            return PrefillPlan(buckets.width(rows, _FULL_PATH_TOKENS), k=k)
        return PrefillPlan(buckets.width(rows), ends=buckets.ends(columns))

    def _keep_scores(self, scores: Logprobs) -> None:
        for row, request in enumerate(self.requests):
            own = jax.tree.map(lambda array, row=row: array[row], scores)
            text = self.engine.codec.decoder(request.params.skip_special_tokens)
            tokens, count = request.prompt[1:], request.params.prompt_logprobs
            dictionaries = own.dictionaries(tokens, count, text)
            self.prompt_logprobs[request.number] = [None, *dictionaries]

    def _read_new(self, size: int) -> list[NewTokens]:
        """Tokens since the last look, read in windows of `size` places; all arrays of a window
        have one shape, whatever rows have grown by."""
        assert self._state is not None
        rows = len(self.rows)
        tokens: list[list[int]] = [[] for _ in range(rows)]
        pieces: list[list[Logprobs]] = [[] for _ in range(rows)]
        while True:
            found = jax.device_get(loop.snapshot(self._state, jnp.asarray(self._read), size=size))
            counts = np.minimum(found.lengths - self._read, size)
            for row in np.flatnonzero(counts[:rows]):
                own = slice(0, counts[row])
                tokens[row] += found.tokens[row, own].tolist()
                if found.logprobs is not None:
                    part = jax.tree.map(lambda a, r=row, own=own: a[r, own], found.logprobs)
                    pieces[row].append(part)
            self._read = self._read + counts
            if (self._read >= found.lengths).all():
                break
        known, self._ended = self._ended, np.array(found.finished)
        self._has_been_read = True
        return [
            NewTokens(row, tokens[row], _join(pieces[row]), bool(found.finished[row]))
            for row in range(rows)
            if tokens[row] and not known[row]
        ]


def _numbered(params: SamplingParams, number: int) -> SamplingParams:
    """The parameters of one of n outputs: each has a seed of its own."""
    if number == 0 or params.seed is None:
        return params
    return dataclasses.replace(params, seed=(params.seed + number) % 2**32)


def _places(counts: Sequence[int], vocab_size: int) -> int | None:
    """Bucket of the number of likeliest tokens to keep; None if nobody wants any."""
    if not counts:
        return None
    if -1 in counts:
        return vocab_size
    return min(bucket(max(counts), 8), vocab_size)


def _join(pieces: list[Logprobs]) -> Logprobs | None:
    if not pieces:
        return None
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *pieces)
