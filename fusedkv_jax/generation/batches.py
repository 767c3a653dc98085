"""Requests that are decoded together: their arrays, their prefill, and visits by the host."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusedkv_jax.generation import loop
from fusedkv_jax.generation.engine import SHORTEST_BUCKET, Engine, Prefix
from fusedkv_jax.generation.logprobs import Logprobs
from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.generation.prefill import compressed, fill
from fusedkv_jax.generation.requests import Request
from fusedkv_jax.generation.results import PlaceLogprobs
from fusedkv_jax.generation.rows import repeat_rows
from fusedkv_jax.generation.sampling import SamplerInputs, bucket

_FULL_PATH_TOKENS = 2048  # of a chunk whose logits are all wanted: they are held at once
_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class News:
    """New tokens of one row.

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
        length: tokens that a row of the cache holds; by default what the requests need.

    Attributes:
        rows: (request, number of the output) of each row.
        prompt_logprobs: by request, where they are wanted.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        prefix: Prefix | None = None,
        length: int = 0,
    ):
        self.engine, self.requests, self.prefix = engine, requests, prefix
        self.rows = [(r, i) for r in requests for i in range(r.params.n)]
        self.size = engine.rows(len(self.rows))
        longest = max(r.limit for r in requests)
        self.length = length or engine.bucket(longest, SHORTEST_BUCKET)
        self.prompt_logprobs: dict[int, list[PlaceLogprobs | None]] = {}
        wanted = [r.params.logprobs for r in requests if r.params.logprobs is not None]
        self.k = _places(wanted, engine.model.config.vocab_size)

    def visits(self, interval: int | None) -> Generator[list[News], list[int] | None, None]:
        """Prefill and decode.

        Args:
            interval: tokens of a row between visits of the host; None for one visit at the end.

        Yields:
            What is new. Rows sent back (by `send`) are ended.
        """
        with self.engine.placement.active():
            state, inputs = self._start()
        starts = self._lengths().copy()
        steps = jnp.asarray(self.length if interval is None else interval, jnp.int32)
        size = self.length if interval is None else interval
        finished = np.zeros(self.size, bool)
        clock = time.perf_counter()
        first = interval is not None
        while not finished.all():
            if not first:
                state = self._decode(state, inputs, steps)
            first = False
            found, starts, ended = _read(state, starts, finished, size, len(self.rows))
            self._count(found, time.perf_counter() - clock)
            clock = time.perf_counter()
            stop = yield found
            finished = ended
            finished[stop or []] = True
            if not finished.all():
                state = dataclasses.replace(state, finished=jnp.asarray(finished))
        if state.extra is not None:
            self.engine.rates.drafted += int(state.extra.drafted.sum())
            self.engine.rates.accepted += int(state.extra.accepted.sum())

    def _decode(self, state, inputs, steps):
        speculation = self.engine.settings.speculation
        decode = loop.decode if speculation is None else speculation.decode
        with self.engine.placement.active():
            return decode(*self.engine.split, state, inputs, steps)

    def _count(self, found: list[News], seconds: float) -> None:
        rates = self.engine.rates
        rates.output_tokens += sum(len(news.tokens) for news in found)
        rates.decode_seconds += seconds

    def _lengths(self) -> np.ndarray:
        """Prompt tokens of each row; 0 for those that only pad."""
        lengths = np.zeros(self.size, np.int32)
        lengths[: len(self.rows)] = [len(r.prompt) for r, _ in self.rows]
        return lengths

    def _start(self) -> tuple[loop.DecodeState, SamplerInputs]:
        """Prefill, and each row's first token."""
        begin = time.perf_counter()
        logits, cache = self._prefill()
        inputs, arrays = self._inputs()
        buffers = None
        if self.k is not None:
            buffers = Logprobs.empty(self.size, self.length, self.k)
        state = loop.begin(logits, *arrays, cache, inputs, buffers)
        jax.block_until_ready(state.lengths)
        rates = self.engine.rates
        rates.prompt_tokens += sum(len(r.prompt) for r in self.requests)
        rates.prefill_seconds += time.perf_counter() - begin
        rates.first_tokens += len(self.rows)
        return state, inputs

    def _inputs(self) -> tuple[SamplerInputs, tuple]:
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
        arrays = (tokens, self._lengths(), limits, stops)
        return SamplerInputs.create(params, words), tuple(map(jnp.asarray, arrays))

    def _prefill(self) -> tuple[Any, Any]:
        """Logits that follow each row's prompt, and the cache; one prefill for a request's rows."""
        engine, shared = self.engine, self.prefix
        skip = 0 if shared is None else len(shared.tokens)
        prompts, lengths = self._prompt_arrays(skip)
        rows = len(lengths)
        if shared is None:
            cache = engine.empty_cache(rows, self._capacity(prompts.shape[1]))
        else:
            cache, _ = repeat_rows(shared.cache, None, jnp.zeros(rows, jnp.int32))
        if engine.settings.compression is not None:
            arrays = jnp.asarray(prompts), jnp.asarray(lengths)
            graph, params = engine.split
            logits, cache = compressed(graph, params, engine.settings.compression, *arrays, cache)
        else:
            logits, cache = self._fill(prompts, lengths, cache)
        if rows == self.size and all(r.params.n == 1 for r in self.requests):
            return logits, cache
        places = np.zeros(self.size, np.int32)
        counts = [r.params.n for r in self.requests]
        places[: len(self.rows)] = np.repeat(np.arange(len(self.requests)), counts)
        cache, logits = repeat_rows(cache, logits, jnp.asarray(places))
        return logits, cache

    def _capacity(self, columns: int) -> int:
        """Tokens of a row that the cache must hold; for compressors, outputs besides the prompt."""
        if self.engine.settings.compression is None:
            return self.length
        return columns + self.engine.bucket(max(r.limit - len(r.prompt) for r in self.requests), 1)

    def _prompt_arrays(self, skip: int) -> tuple[np.ndarray, np.ndarray]:
        """The prompts after the shared prefix, one row for each request."""
        engine = self.engine
        longest = max(len(r.prompt) for r in self.requests) - skip
        shape = engine.rows(len(self.requests)), engine.bucket(longest, SHORTEST_BUCKET)
        prompts, lengths = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
        for row, request in enumerate(self.requests):
            tokens = request.prompt[skip:]
            prompts[row, : len(tokens)], lengths[row] = tokens, len(tokens)
        return prompts, lengths

    def _fill(self, prompts, lengths, cache) -> tuple[Any, Any]:
        engine = self.engine
        wanted = [r.params.prompt_logprobs for r in self.requests]
        scored = [count for count in wanted if count is not None]
        limit = engine.settings.max_num_batched_tokens
        if scored:
            limit = min(limit or _FULL_PATH_TOKENS, _FULL_PATH_TOKENS)
        k = _places(scored, engine.model.config.vocab_size)
        width = engine.width(len(lengths), limit)
        ends = None if scored else engine.ends(prompts.shape[1])
        logits, cache, scores = fill(
            engine.split, prompts, lengths, cache, width=width, k=k, ends=ends
        )
        if scores is not None:
            for row, (request, count) in enumerate(zip(self.requests, wanted, strict=True)):
                assert count is not None
                own = jax.tree.map(lambda array, row=row: array[row], scores)
                self.prompt_logprobs[request.number] = self._dictionaries(request, own, count)
        return logits, cache

    def _dictionaries(self, request: Request, scores: Logprobs, count: int):
        text = self.engine.codec.decoder(request.params.skip_special_tokens)
        return [None, *scores.dictionaries(request.prompt[1:], count, text)]


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


def _read(
    state: loop.DecodeState, starts: np.ndarray, finished: np.ndarray, size: int, rows: int
) -> tuple[list[News], np.ndarray, np.ndarray]:
    """New tokens of each row since `starts`; lengths; and which rows have ended."""
    tokens: list[list[int]] = [[] for _ in range(rows)]
    pieces: list[list[Logprobs]] = [[] for _ in range(rows)]
    while True:
        found = jax.device_get(loop.news(state, jnp.asarray(starts), size=size))
        counts = np.minimum(found.lengths - starts, size)
        for row in np.flatnonzero(counts[:rows]):
            count = counts[row]
            tokens[row] += found.tokens[row, :count].tolist()
            if found.logprobs is not None:
                pieces[row].append(jax.tree.map(lambda a, r=row, c=count: a[r, :c], found.logprobs))
        starts = starts + counts
        if (starts >= found.lengths).all():
            break
    news = [
        News(row, tokens[row], _join(pieces[row]), bool(found.finished[row]))
        for row in range(rows)
        if tokens[row] and not finished[row]
    ]
    return news, starts, np.array(found.finished)


def _join(pieces: list[Logprobs]) -> Logprobs | None:
    if not pieces:
        return None
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *pieces)
