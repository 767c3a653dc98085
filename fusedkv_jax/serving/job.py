"""What a caller has asked for, and what has come of it: a prompt with its n outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fusedkv_jax.generation.logprobs import Logprobs
from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.generation.requests import PreparedRequest as Prompt
from fusedkv_jax.generation.results import PlaceLogprobs
from fusedkv_jax.generation.sampling import NO_TOKEN
from fusedkv_jax.generation.tracker import Tracker
from fusedkv_jax.serving.draws import NONE_ALLOWED, TokenDraw
from fusedkv_jax.serving.grammars import Constraint
from fusedkv_jax.serving.output import OutputDelta
from fusedkv_jax.serving.request import Request
from fusedkv_jax.serving.runner import Drawn


@dataclass(eq=False)
class Growing:
    """One of a job's outputs: its text so far, and the request that the scheduler knows.

    Attributes:
        tracker: its tokens and text; `finished` tells whether it has ended.
        params: how it is decoded, with a seed of its own.
        request: what the scheduler knows of it.
        constraint: the form that it is held to.
    """

    tracker: Tracker
    params: SamplingParams
    request: Request
    constraint: Constraint | None = None

    def draw(self) -> TokenDraw:
        """How its next token is drawn."""
        return TokenDraw(self.request, self.tracker.request, self.params, self.constraint)

    def take(self, drawn: Sequence[Drawn], position: int) -> OutputDelta:
        """Its next tokens, from a position on, up to one that ends it, which `tracker.finished`
        tells, or that cannot be: a later step will say so."""
        delta = self._take(drawn[0], position)
        for number, each in enumerate(drawn[1:], start=1):
            if self.tracker.finished or each.token in (NO_TOKEN, NONE_ALLOWED):
                break
            delta = delta.followed_by(self._take(each, position + number))
        return delta

    def _take(self, drawn: Drawn, position: int) -> OutputDelta:
        prompt, tracker, constraint = self.tracker.request, self.tracker, self.constraint
        if drawn.token in (NO_TOKEN, NONE_ALLOWED):
            return self._fail(drawn.token)
        complete = False
        if constraint is not None:
            constraint.accept(drawn.token)
            if constraint.error is not None:
                return self._fail(NO_TOKEN, f"cannot be continued: {constraint.error}")
            complete = constraint.complete
        ended = complete or drawn.token in prompt.stops or position + 1 >= prompt.limit
        text, tokens, logprobs = tracker.push([drawn.token], drawn.logprobs, ended, complete)
        return OutputDelta(
            tracker.index,
            tokens,
            text or "",
            None if logprobs is None else tuple(logprobs),
            tracker.finish_reason,
            tracker.stop_reason,
        )

    def _fail(self, token: int, reason: str | None = None) -> OutputDelta:
        self.tracker.push([NO_TOKEN], None, True)
        assert self.tracker.error is not None
        if token == NONE_ALLOWED:
            reason = (
                "cannot be continued: bad_words, min_tokens, logit_bias and structured_outputs"
                " together exclude every token"
            )
        error = reason or self.tracker.error.reason
        return OutputDelta(self.tracker.index, finish_reason="error", error=error)


@dataclass(eq=False)
class Job:
    """A prompt with n outputs, of which the first alone runs until the prompt is computed.

    Attributes:
        name: what the caller calls it.
        prompt: its tokens and parameters, checked.
        outputs: all n.
        decode: text of tokens, for the entries of log-probabilities.
        cached: tokens of the prompt that were found in the prefix cache.
        scores: log-probabilities of the prompt's tokens but the first, by their positions.
    """

    name: str
    prompt: Prompt
    outputs: list[Growing] = field(default_factory=list)
    decode: Callable[[Sequence[int]], str] | None = None
    cached: int = 0
    scores: dict[int, PlaceLogprobs] = field(default_factory=dict)
    _told: bool = False

    @property
    def live(self) -> list[Growing]:
        """Outputs that have not ended."""
        return [output for output in self.outputs if not output.tracker.finished]

    def score(self, start: int, logprobs: Logprobs) -> None:
        """Take in what the tokens from position `start` on say of those after them."""
        tokens = self.prompt.prompt[start + 1 : start + 1 + len(logprobs.chosen)]
        wanted = self.prompt.params.prompt_logprobs
        places = logprobs.dictionaries(tokens, wanted, self.decode)
        self.scores |= dict(enumerate(places, start=start + 1))

    @property
    def is_scored(self) -> bool:
        """All of the prompt is, if that was asked for."""
        wanted = self.prompt.params.prompt_logprobs is not None
        return not wanted or len(self.scores) == len(self.prompt.prompt) - 1

    def told(self, delta: OutputDelta) -> OutputDelta:
        """A delta with what is the same for all of the job's, and the first with the scores."""
        size, scores = len(self.prompt.prompt), None
        if self.prompt.params.prompt_logprobs is not None and self.is_scored and not self._told:
            scores = (None, *(self.scores[position] for position in range(1, size)))
        self._told = True
        return dataclasses.replace(
            delta, prompt_tokens=size, prompt_logprobs=scores, cached_tokens=self.cached
        )
