"""Speculative decoding in engines: tokens are drafted, and a step checks several of a request.

The token at each position is drawn as ever, from the model's own logits with the random key of its
position; what was drafted is kept as far as it is what was drawn. So speculation changes no output,
greedy or drawn. For a draft without randomness of its own this is as often as rejection sampling
(arXiv 2211.17192) would keep it: with the probability that the model gives it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.generation.settings import check_whole
from fusedkv_jax.generation.speculation import SelfSpeculation
from fusedkv_jax.serving.draws import TokenDraw
from fusedkv_jax.serving.plan import StepPlan
from fusedkv_jax.serving.request import Request

# Tokens that are guessed for each request of a plan, at most as many as it has `room` for.
Drafter = Callable[[StepPlan, Sequence[TokenDraw]], list[list[int]]]


@dataclass(frozen=True, kw_only=True)
class NGramSpeculation:
    """Drafts what followed the last tokens where they occurred before, in prompt or output.

    Prompt lookup decoding (A. Saxena, 2023; `method="ngram"` of vLLM): no model drafts, and it pays
    where outputs repeat their context, such as summaries, edits and code.

    Attributes:
        draft_tokens: tokens of a draft, at most; 0 is plain decoding.
        prompt_lookup_min, prompt_lookup_max: last tokens that must have occurred before, as many of
            them as possible; of several places the latest counts.

    Raises:
        ValueError: a value of the wrong kind or out of bounds.
    """

    draft_tokens: int = 4
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 4

    def __post_init__(self) -> None:
        check_whole("draft_tokens", self.draft_tokens, 0)
        check_whole("prompt_lookup_min", self.prompt_lookup_min, 1)
        check_whole("prompt_lookup_max", self.prompt_lookup_max, self.prompt_lookup_min)

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError where a model cannot use it."""
        if self.draft_tokens >= config.max_length:
            raise ValueError(
                f"draft_tokens={self.draft_tokens}; use less than the model's"
                f" max_length={config.max_length}"
            )


Speculation = SelfSpeculation | NGramSpeculation


class NGramDrafter:
    """Drafts for the requests of an engine.

    Args:
        speculation: how.
    """

    def __init__(self, speculation: NGramSpeculation):
        self._lengths = range(speculation.prompt_lookup_min, speculation.prompt_lookup_max + 1)
        self._known: weakref.WeakKeyDictionary[Request, NGrams] = weakref.WeakKeyDictionary()

    def __call__(self, plan: StepPlan, draws: Sequence[TokenDraw]) -> list[list[int]]:
        return [self._draft(*pair) for pair in zip(plan.requests, plan.room, strict=True)]

    def _draft(self, request: Request, room: int) -> list[int]:
        known = self._known.get(request)
        if known is None:
            known = self._known[request] = NGrams(self._lengths)
        size = len(known.tokens)
        known.extend(map(int, request.tokens(size, request.length - size)))
        return known.continuation(room)


class NGrams:
    """Tokens, and where each of their n-grams was seen last.

    Args:
        lengths: values of n, ascending.

    Attributes:
        tokens: all of them.
    """

    def __init__(self, lengths: Sequence[int]):
        self.tokens: list[int] = []
        self._lengths = lengths
        self._followers: dict[tuple[int, ...], int] = {}  # place of the token behind an n-gram

    def extend(self, tokens: Iterable[int]) -> None:
        """Further tokens."""
        known = self.tokens
        for token in tokens:
            size = len(known)
            for n in self._lengths:
                if n > size:
                    break
                self._followers[tuple(known[size - n :])] = size
            known.append(token)

    def continuation(self, count: int) -> list[int]:
        """So many tokens as they followed the longest n-gram of the end before; none if never.

        Where they reach the end they go on with themselves: what repeats is continued.
        """
        known, size = self.tokens, len(self.tokens)
        for n in reversed(self._lengths):
            place = self._followers.get(tuple(known[size - n :])) if n <= size else None
            if place is not None:
                drafts = known[place : place + count]
                while len(drafts) < count:
                    drafts.append(drafts[len(drafts) - (size - place)])
                return drafts
        return []
