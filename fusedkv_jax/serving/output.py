"""What an engine gives back, and what it says of itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fusedkv_jax.generation.results import FinishReason, PlaceLogprobs


@dataclass(frozen=True)
class OutputDelta:
    """What one output has grown by. All deltas of an output, joined, are the output.

    Attributes:
        index: number of the output among the request's n.
        token_ids: new tokens.
        text: new text: whole characters, never a part of a stop text; may be empty, and is so
            without a tokenizer.
        logprobs: of the tokens, if asked for.
        finish_reason: None until the last delta of the output.
        stop_reason: the stop text, or the id of the stop token unless it is the end-of-text token.
        prompt_tokens: tokens of the prompt.
        prompt_logprobs: of the prompt's tokens, None for the first one, if asked for; the first
            delta of a request has them.
        cached_tokens: those of them that were found in the prefix cache.
        error: what went wrong, with the finish reason `error`; to be read after the request's name.
    """

    index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[PlaceLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_tokens: int = 0
    prompt_logprobs: tuple[PlaceLogprobs | None, ...] | None = None
    cached_tokens: int = 0
    error: str | None = None

    def followed_by(self, later: OutputDelta) -> OutputDelta:
        """Both as one: a step may give several tokens."""
        logprobs = None if self.logprobs is None else (*self.logprobs, *(later.logprobs or ()))
        return dataclasses.replace(
            later,
            token_ids=self.token_ids + later.token_ids,
            text=self.text + later.text,
            logprobs=logprobs,
        )


@dataclass(frozen=True)
class EngineStats:
    """Figures of an engine; those from `prefix_hits` on count from its start.

    Attributes:
        running, waiting: requests that hold pages, and that wait.
        pages_used, pages_total: pages that running requests hold, and all.
        page_size: tokens of a page.
        prefix_hits, prefix_queries: prompt tokens found in the prefix cache, and looked for.
        steps: steps that have run.
        prompt_tokens, generated_tokens: of requests that have begun their output.
        preemptions: how often a request gave up its pages.
        lower_rows, upper_rows: tokens that passed through the layers that cache something, and
            through those above.
        drafts, draft_tokens, accepted_tokens: drafts that were checked, their tokens, and those of
            them that are in outputs.
        undrafted_steps: steps that left drafts out, as these had not paid.
    """

    running: int
    waiting: int
    pages_used: int
    pages_total: int
    page_size: int
    prefix_hits: int = 0
    prefix_queries: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    lower_rows: int = 0
    upper_rows: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    undrafted_steps: int = 0
