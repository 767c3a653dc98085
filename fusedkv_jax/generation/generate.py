"""`generate`: prompts in, completions out, in the order of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from fusedkv_jax.generation.batches import Batch
from fusedkv_jax.generation.engine import SHORTEST_BUCKET, Engine
from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.generation.requests import OnError, Request, Tokenizer, make_requests
from fusedkv_jax.generation.results import Completion, Delta, Rates
from fusedkv_jax.generation.rows import repeat_rows
from fusedkv_jax.generation.tracker import Tracker
from fusedkv_jax.model import Decoder, fold_fusion

_VISIT_EVERY = 16  # tokens between visits where a stop text may come or progress is shown


def generate(
    model: Decoder,
    prompts: Sequence[Any],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    eos_id: int | None = None,
    on_error: OnError = "raise",
    progress: Callable[[Rates], None] | None = None,
    **settings: Any,
) -> list[Completion]:
    """Continue prompts.

    All prompts are checked before anything runs. Then batches are prefilled and decoded, each by
    one compiled loop. What all prompts begin with is prefilled once, and `n` outputs of a prompt
    share its prefill.

    Args:
        model: the model.
        prompts: texts (with `tokenizer`), or lists or arrays of token ids.
        params: sampling parameters, one for all prompts or one for each.
        tokenizer: encodes prompts, decodes outputs and names the end-of-text token.
        eos_id: end-of-text token where there is no tokenizer.
        on_error: with `return`, a prompt that is refused gives a completion without outputs whose
            `error` says why, and the others run.
        progress: called now and then with the rates so far.
        **settings: how to run:
            batch_size (32): outputs decoded together at most (more where one prompt wants more).
            cache_dtype: storage type of the cache, by default the model's activation type.
            bucketing (True): round batch, prompt and cache lengths up to powers of two, so that new
                lengths rarely compile. Outputs do not depend on it.
            max_num_batched_tokens: tokens that one step of prefill processes at most, over all
                prompts of a batch; longer prompts are prefilled in chunks. Default no bound.
            enable_prefix_caching (True): prefill what all prompts begin with (16 tokens or more)
                once.
            compression: a compressor of `fusedkv_jax.compression`; it prefills whole prompts.
            speculation: a speculative decoder; it replaces the loop and keeps its outputs.
            mesh: devices to run on, as `fusedkv_jax.sharding.make_mesh` gives them; by default the
                mesh that is set (`jax.set_mesh`), or one device. Rows are split over `data` and
                `fsdp`, heads over `tensor`.
            prefill_parts: prefill in parts, one for each place of the mesh's `context` axis:
                `equal`, `balanced`, or their relative sizes (`fusedkv_jax.generation.parts`).

    Returns:
        One completion per prompt, in order. Where prompt and `max_tokens` exceed the model's
        `max_length`, the output is cut there.

    Raises:
        PromptError: an empty prompt, one that fills the model's context, a token id outside
            the vocabulary, or a parameter that cannot be met.
    """
    requests, errors = make_requests(model.config, prompts, params, tokenizer, eos_id, on_error)
    engine = Engine(fold_fusion(model), tokenizer, **settings)
    completions: dict[int, Completion] = {
        number: Completion((), (), error=str(error)) for number, error in errors.items()
    }
    for batch in _batches(engine, requests):
        searching = any(request.params.stop for request in batch.requests)
        interval = _VISIT_EVERY if searching or progress is not None else None
        trackers = _trackers(batch, engine, piecewise=interval is not None)
        for _ in _track(batch, trackers, interval):
            if progress is not None:
                progress(engine.rates)
        for request in batch.requests:
            outputs = tuple(t.output() for t in trackers if t.request is request)
            scores = batch.prompt_logprobs.get(request.number)
            completions[request.number] = Completion(request.prompt, outputs, scores)
        engine.rates.requests += len(batch.requests)
        if progress is not None:
            progress(engine.rates)
    return [completions[i] for i in range(len(prompts))]


def stream(
    model: Decoder,
    prompts: Sequence[Any],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    eos_id: int | None = None,
    stream_interval: int = 4,
    progress: Callable[[Rates], None] | None = None,
    **settings: Any,
) -> Iterator[Delta]:
    """Continue prompts and give back what there is as it comes.

    Args:
        stream_interval: tokens of an output between deltas; the first delta has one token. The
            loop in between is compiled, so larger is faster.
        model, prompts, params, tokenizer, eos_id, progress, **settings: as for `generate`.

    Returns:
        Deltas; those of different outputs are interleaved. Each output's last delta has a
        `finish_reason`.

    Raises:
        PromptError: as `generate`, at the call, before the first delta.
    """
    if stream_interval < 1:
        raise ValueError(f"stream_interval={stream_interval}; use at least 1")
    requests, _ = make_requests(model.config, prompts, params, tokenizer, eos_id)
    engine = Engine(fold_fusion(model), tokenizer, **settings)

    def deltas() -> Iterator[Delta]:
        for batch in _batches(engine, requests):
            trackers = _trackers(batch, engine, piecewise=True)
            for found in _track(batch, trackers, stream_interval):
                if progress is not None:
                    progress(engine.rates)
                yield from found
            engine.rates.requests += len(batch.requests)

    return deltas()


def warm_up(
    model: Decoder, *, batch_size: int, max_length: int, stream_interval: int = 4, **settings: Any
) -> int:
    """Compile every bucket that prompts and outputs of up to `max_length` tokens can need.

    Lists that requests bring (stop tokens, biases, bad words) are covered up to 4 entries, and
    requests without log-probabilities.

    Args:
        model: the model.
        batch_size: batches of 1, 2, 4, ... up to this many rows are compiled.
        max_length: longest prompt and output together, in tokens.
        stream_interval: as it will be given to `stream`.
        **settings: as for `generate`.

    Returns:
        The number of buckets.
    """
    engine = Engine(fold_fusion(model), batch_size=batch_size, **settings)
    greedy = SamplingParams(temperature=0.0)
    rows = _powers(1, batch_size)
    totals = _powers(SHORTEST_BUCKET, min(max_length, model.config.max_length))
    buckets = 0
    for total in totals:
        for size in _powers(SHORTEST_BUCKET, total):
            prompt = (0,) * max(1, min(size, total - 2))
            prefix = engine.prefill_prefix(prompt[: size - 1] or prompt, total)
            for count in rows:
                request = Request(0, prompt, greedy, len(prompt) + 2, (), None, ())
                for interval in (None, _VISIT_EVERY, stream_interval):
                    for _ in Batch(engine, [request] * count, length=total).visits(interval):
                        pass
                with engine.placement.active():
                    repeat_rows(prefix.cache, None, jnp.zeros(engine.rows(count), jnp.int32))
                buckets += 1
    return buckets


def _batches(engine: Engine, requests: Sequence[Request]) -> Iterator[Batch]:
    prefix, length = engine.shared_prefix(requests)
    for group in engine.batches(requests):
        if group[0].params.prompt_logprobs is None:
            yield Batch(engine, group, prefix, length)
        else:
            yield Batch(engine, group)


def _trackers(batch: Batch, engine: Engine, piecewise: bool) -> list[Tracker]:
    return [Tracker(request, number, engine.tokenizer, piecewise) for request, number in batch.rows]


def _track(batch: Batch, trackers: list[Tracker], interval: int | None) -> Iterator[list[Delta]]:
    """Hand a batch's news to the trackers, and end the rows whose text has ended."""
    visits = batch.visits(interval)
    stop = None
    while True:
        try:
            found = visits.send(stop)
        except StopIteration:
            return
        deltas = []
        for news in found:
            tracker = trackers[news.row]
            text, tokens, logprobs = tracker.push(news.tokens, news.logprobs, news.ended)
            reasons = tracker.finish_reason, tracker.stop_reason
            delta = Delta(tracker.request.number, tracker.index, text, tokens, logprobs, *reasons)
            deltas.append(delta)
        stop = [row for row, tracker in enumerate(trackers) if tracker.finished]
        yield deltas


def _powers(least: int, most: int) -> list[int]:
    """Powers of two from `least` up to the first that holds `most`."""
    powers = [least]
    while powers[-1] < most:
        powers.append(powers[-1] * 2)
    return powers
