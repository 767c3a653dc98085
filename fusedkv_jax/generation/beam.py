"""`beam_search`: the best continuations of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import jax.numpy as jnp
import numpy as np

from fusedkv_jax.data.encoding import output_decoder
from fusedkv_jax.generation.beam_loop import Beams, Limits, Sizes
from fusedkv_jax.generation.chunked_prefill import PrefillPlan, PromptArrays
from fusedkv_jax.generation.engine import OfflineEngine
from fusedkv_jax.generation.params import BeamSearchParams, SamplingParams
from fusedkv_jax.generation.requests import (
    PreparedRequest,
    Prompt,
    PromptError,
    TokenizerLike,
    logits_error,
    make_requests,
)
from fusedkv_jax.generation.results import Completion, Output
from fusedkv_jax.generation.sampling import bucket
from fusedkv_jax.generation.settings import (
    EngineSettings,
    Settings,
    check_model,
    takes_settings,
)
from fusedkv_jax.model import Decoder


@takes_settings
def beam_search(
    model: Decoder,
    prompts: Sequence[Prompt],
    params: BeamSearchParams | None = None,
    *,
    tokenizer: TokenizerLike | None = None,
    **settings: Unpack[Settings],
) -> list[Completion]:
    """Continue prompts by beam search.

    In every step each beam is continued by every token. Of the best `beam_width` continuations,
    those that end with a stop token are complete; the best `beam_width` of the others go on. At
    `max_tokens` all are complete. The rows of the cache follow their beams.

    Args:
        model: the model.
        prompts: texts (with `tokenizer`), or lists or arrays of token ids.
        params: parameters for all prompts.
        tokenizer: encodes prompts, decodes outputs and names the end-of-text token.
        **settings: as for `generate`; `batch_size` counts beams. Compression and speculation are
            refused.

    Returns:
        One completion per prompt, in order, its outputs best first, with `cumulative_logprob`.

    Raises:
        PromptError, LogitsError, ValueError: as `generate`.
    """
    check_model(model)
    if not isinstance(params, BeamSearchParams | None):
        raise PromptError(f"params={params!r}; beam_search takes BeamSearchParams(...)")
    for name in ("compression", "speculation"):
        if settings.get(name) is not None:
            raise ValueError(f"beam_search does not take {name}; leave it out, or use generate")
    params = params or BeamSearchParams()
    plain = SamplingParams(
        max_tokens=params.max_tokens,
        ignore_eos=params.ignore_eos,
        stop_token_ids=params.stop_token_ids,
    )
    engine = OfflineEngine(model, tokenizer, EngineSettings(**settings))
    requests, _ = make_requests(model.config, prompts, plain, engine.codec)
    together = max(1, engine.settings.batch_size // params.beam_width)
    together = min(together, engine.settings.most_rows)  # of prefill: a row for each prompt
    order = sorted(requests, key=lambda request: len(request.prompt))
    completions = {}
    for first in range(0, len(order), together):
        batch = order[first : first + together]
        beams = _search_batch(engine, batch, params)
        for row, request in enumerate(batch):
            completions[request.number] = _completion(request, beams, row, params, tokenizer)
    return [completions[i] for i in range(len(prompts))]


def _search_batch(
    engine: OfflineEngine, requests: list[PreparedRequest], params: BeamSearchParams
) -> Beams:
    buckets, programs, width = engine.buckets, engine.programs, params.beam_width
    rows = buckets.rows(len(requests))
    longest = buckets.size(max(len(r.prompt) for r in requests))
    total = buckets.size(max(r.limit for r in requests))
    most = buckets.size(max(r.limit - len(r.prompt) for r in requests))
    prompts = PromptArrays(np.zeros((rows, longest), np.int32), np.zeros(rows, np.int32))
    limits = np.zeros(rows, np.int32)
    for row, request in enumerate(requests):
        prompts.tokens[row, : len(request.prompt)] = request.prompt
        prompts.lengths[row] = len(request.prompt)
        limits[row] = request.limit - len(request.prompt)
    stops = np.full(bucket(len(requests[0].stops)), -1, np.int32)
    stops[: len(requests[0].stops)] = requests[0].stops
    plan = PrefillPlan(buckets.width(rows), ends=buckets.ends(longest))
    logits, cache, _ = programs.prefill(prompts, programs.empty_cache(rows, total), plan)
    cache, logits = programs.repeat_rows(cache, logits, np.repeat(np.arange(rows), width))
    assert logits is not None
    early = 2 if params.early_stopping == "never" else int(params.early_stopping)
    bounds = Limits(
        jnp.asarray(limits),
        jnp.asarray(stops),
        jnp.float32(params.length_penalty),
        jnp.int32(early),
        jnp.asarray(prompts.lengths == 0),
    )
    return programs.search(logits, cache, bounds, Sizes(width, most))


def _completion(
    request: PreparedRequest,
    beams: Beams,
    row: int,
    params: BeamSearchParams,
    tokenizer: TokenizerLike | None,
) -> Completion:
    if np.isnan(beams.sums[row]).any():
        raise logits_error(request.number, "on some beam")
    outputs = []
    for index in range(params.n or params.beam_width):
        length = int(beams.done_lengths[row, index])
        if length == 0:  # fewer sequences exist than there are beams
            break
        tokens = tuple(np.asarray(beams.done[row, index, :length]).tolist())
        stopped = tokens[-1] in request.stops
        text = None
        if tokenizer is not None:
            text = output_decoder(tokenizer)(tokens[: length - stopped])
        reason = tokens[-1] if stopped and tokens[-1] != request.eos_id else None
        total = float(beams.done_sums[row, index])
        outputs.append(Output(index, text, tokens, "stop" if stopped else "length", reason, total))
    return Completion(request.prompt, tuple(outputs))
