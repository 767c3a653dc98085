"""`generate`: prompts in, completions out, in the order of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Unpack

import numpy as np

from fusedkv_jax.generation.batches import Batch
from fusedkv_jax.generation.buckets import SHORTEST_BUCKET
from fusedkv_jax.generation.engine import OfflineEngine, group
from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.generation.prefix import prefill_prefix, shared_prefix
from fusedkv_jax.generation.requests import (
    OnError,
    PreparedRequest,
    Prompt,
    TokenizerLike,
    make_requests,
)
from fusedkv_jax.generation.results import Completion, Delta, Rates
from fusedkv_jax.generation.settings import (
    EngineSettings,
    Settings,
    check_model,
    check_whole,
    takes_settings,
)
from fusedkv_jax.generation.tracker import Tracker
from fusedkv_jax.model import Decoder

_VISIT_EVERY = 16  # tokens between visits where a stop text may come or progress is shown


@takes_settings
def generate(
    model: Decoder,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    tokenizer: TokenizerLike | None = None,
    on_error: OnError = "raise",
    progress: Callable[[Rates], None] | None = None,
    **settings: Unpack[Settings],
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
        on_error: with `return`, a prompt that is refused, or fails, gives a completion without
            outputs whose `error` says why, and the others run.
        progress: called now and then with the rates so far.
        **settings: how to run, see `EngineSettings`: eos_id, add_special_tokens, batch_size,
            cache_dtype, bucketing, max_num_batched_tokens, enable_prefix_caching, compression,
            speculation, mesh, prefill_parts.

    Returns:
        One completion per prompt, in order. Where prompt and `max_tokens` exceed the model's
        `max_length`, the output is cut there.

    Raises:
        PromptError: an empty prompt, one that fills the model's context, a token id outside
            the vocabulary, or a parameter that cannot be met.
        LogitsError: the model's logits are not finite, which damaged weights lead to.
        ValueError: a setting out of bounds, or one that the model cannot have.
    """
    engine = _engine(model, tokenizer, settings, progress)
    requests, errors = make_requests(model.config, prompts, params, engine.codec, on_error)
    completions: dict[int, Completion] = {}
    for batch in _batches(engine, requests):
        searching = any(request.params.stop for request in batch.requests)
        interval = _VISIT_EVERY if searching or progress is not None else None
        trackers = _trackers(batch, engine, piecewise=interval is not None)
        for _ in _track(batch, trackers, interval):
            if progress is not None:
                progress(engine.rates)
        errors |= {t.request.number: t.error for t in trackers if t.error is not None}
        if on_error == "raise" and errors:
            raise errors[min(errors)]
        for request in batch.requests:
            if request.number in errors:
                continue
            outputs = tuple(t.output() for t in trackers if t.request is request)
            scores = batch.prompt_logprobs.get(request.number)
            completions[request.number] = Completion(request.prompt, outputs, scores)
        engine.rates.requests += len(batch.requests)
        if progress is not None:
            progress(engine.rates)
    for number, error in errors.items():
        completions[number] = Completion((), (), error=str(error))
    return [completions[i] for i in range(len(prompts))]


@takes_settings
def stream(
    model: Decoder,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    tokenizer: TokenizerLike | None = None,
    stream_interval: int = 4,
    progress: Callable[[Rates], None] | None = None,
    **settings: Unpack[Settings],
) -> Iterator[Delta]:
    """Continue prompts and give back what there is as it comes.

    Arguments that are not explained here are those of `generate`.

    Args:
        stream_interval: tokens of an output between deltas; the first delta has one token. The
            loop in between is compiled, so larger is faster.

    Returns:
        Deltas; those of different outputs are interleaved. Each output's last delta has a
        `finish_reason`.

    Raises:
        PromptError, ValueError: as `generate`, at the call, before the first delta.
        LogitsError: as `generate`, once it happens.
    """
    check_whole("stream_interval", stream_interval, 1)
    engine = _engine(model, tokenizer, settings, progress)
    requests, _ = make_requests(model.config, prompts, params, engine.codec)

    def deltas() -> Iterator[Delta]:
        for batch in _batches(engine, requests):
            trackers = _trackers(batch, engine, piecewise=True)
            for found in _track(batch, trackers, stream_interval):
                if progress is not None:
                    progress(engine.rates)
                yield from found
                for tracker in trackers:
                    if tracker.error is not None:
                        raise tracker.error
            engine.rates.requests += len(batch.requests)

    return deltas()


@takes_settings
def warm_up(
    model: Decoder,
    *,
    max_length: int,
    stream_interval: int = 4,
    **settings: Unpack[Settings],
) -> int:
    """Compile every bucket that prompts and outputs of up to `max_length` tokens can need.

    Lists that requests bring (stop tokens, biases, bad words) are covered up to 4 entries, and
    requests without log-probabilities.

    Args:
        model: the model.
        max_length: longest prompt and output together, in tokens.
        stream_interval: as it will be given to `stream`.
        **settings: as for `generate`. Batches of 1, 2, 4, ... up to `batch_size` rows are compiled.

    Returns:
        The number of buckets.
    """
    check_whole("max_length", max_length, 2)
    check_whole("stream_interval", stream_interval, 1)
    engine = _engine(model, None, settings)
    check_whole("max_length", max_length, 2, model.config.max_length)
    greedy = SamplingParams(temperature=0.0)
    rows = _powers(1, engine.settings.batch_size)
    totals = _powers(SHORTEST_BUCKET, max_length)
    buckets = 0
    for total in totals:
        for size in _powers(SHORTEST_BUCKET, total):
            prompt = (0,) * max(1, min(size, total - 2))
            prefix = prefill_prefix(engine, prompt[: size - 1] or prompt, total)
            for count in rows:
                request = PreparedRequest(0, prompt, greedy, len(prompt) + 2, (), None, ())
                for interval in (None, _VISIT_EVERY, stream_interval):
                    batch = Batch(engine, [request] * count, length=total)
                    while not batch.finished:
                        batch.step(interval)
                engine.programs.repeat_rows(prefix.cache, None, np.zeros(batch.size))
                buckets += 1
    return buckets


def _engine(
    model: Decoder,
    tokenizer: TokenizerLike | None,
    settings: Settings,
    progress: Callable[[Rates], None] | None = None,
) -> OfflineEngine:
    check_model(model)
    if progress is not None and not callable(progress):
        raise ValueError(f"progress={progress!r}; pass a function that takes the rates, or None")
    return OfflineEngine(model, tokenizer, EngineSettings(**settings))


def _batches(engine: OfflineEngine, requests: Sequence[PreparedRequest]) -> Iterator[Batch]:
    prefix = shared_prefix(engine, requests)
    for together in group(requests, engine.settings):
        scored = together[0].params.prompt_logprobs is not None
        yield Batch(engine, together, None if scored else prefix)


def _trackers(batch: Batch, engine: OfflineEngine, piecewise: bool) -> list[Tracker]:
    return [Tracker(request, number, engine.codec, piecewise) for request, number in batch.rows]


def _track(batch: Batch, trackers: list[Tracker], interval: int | None) -> Iterator[list[Delta]]:
    """Hand a batch's tokens to the trackers, and end the rows whose text has ended."""
    while not batch.finished:
        deltas = []
        for new in batch.step(interval):
            tracker = trackers[new.row]
            text, tokens, logprobs = tracker.push(new.tokens, new.logprobs, new.ended)
            if tracker.error is not None:
                continue
            reasons = tracker.finish_reason, tracker.stop_reason
            delta = Delta(tracker.request.number, tracker.index, text, tokens, logprobs, *reasons)
            deltas.append(delta)
        batch.end([row for row, tracker in enumerate(trackers) if tracker.finished])
        yield deltas


def _powers(least: int, most: int) -> list[int]:
    """Powers of two from `least` up to the first that holds `most`."""
    powers = [least]
    while powers[-1] < most:
        powers.append(powers[-1] * 2)
    return powers
