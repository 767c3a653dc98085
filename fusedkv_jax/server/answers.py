"""OpenAI's forms of what the engine makes: whole answers, chunks of a stream, log-probabilities."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from fusedkv_jax.generation.results import PlaceLogprobs
from fusedkv_jax.server.generation import Generation, Grown
from fusedkv_jax.server.places import Echo, Offsets
from fusedkv_jax.server.prompts import Spelled

# A token, and the log-probabilities at its place; none at the first of a prompt.
Place = tuple[int, PlaceLogprobs | None]
Scores = tuple[PlaceLogprobs | None, ...]
Spell = Callable[[int], Spelled]
DONE = b"data: [DONE]\n\n"
_LEAST = -9999.0  # stands for minus infinity, which JSON has not; vLLM's


def event(document: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


def usage(generation: Generation) -> dict[str, Any]:
    """The tokens of a request so far."""
    prompt = sum(map(len, generation.prompts))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generation.completion_tokens,
        "total_tokens": prompt + generation.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


class Asked(NamedTuple):
    """Log-probabilities that an answer shows.

    Attributes:
        top: of so many likeliest tokens besides the chosen one; None for none.
        prompt: likewise at each place of the prompt, under vLLM's name for them.
    """

    top: int | None = None
    prompt: int | None = None


@dataclass
class _Choice:
    """What a choice has become."""

    texts: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    finish_reason: str | None = None


class Answer:
    """An answer that grows.

    Args:
        name: its id.
        model: as it is served.
        asked: which log-probabilities it shows.
        spell: text and bytes of a token, special ones included.
    """

    kind = chunk_kind = ""

    def __init__(self, name: str, model: str, asked: Asked, spell: Spell):
        self._head = {"id": name, "created": int(time.time()), "model": model}
        self.asked, self.spell = asked, spell
        self._choices: dict[int, _Choice] = {}
        self.scores: dict[int, Scores] = {}  # of each prompt

    def add(self, grown: Grown) -> None:
        """Keep what has come."""
        choice = self._take(grown)
        choice.texts.append(grown.delta.text)
        choice.places.extend(self.places(grown))
        choice.finish_reason = grown.delta.finish_reason

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The document of all that was kept."""
        choices = [
            self.choice(i, "".join(choice.texts), choice.places, choice.finish_reason)
            for i, choice in sorted(self._choices.items())
        ]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage(generation)}

    def chunks(self, grown: Grown) -> Iterator[dict[str, Any]]:
        """Documents of what has come; none while it is held back."""
        choice = self._take(grown)
        if not choice.texts:
            yield from (self.chunk([first]) for first in self.first(grown.choice))
            choice.texts.append("")
        delta, places = grown.delta, self.places(grown)
        if delta.text or places or delta.finish_reason is not None:
            part = self.part(grown.choice, delta.text, places, delta.finish_reason)
            if part is not None:
                yield self.chunk([part])

    def chunk(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A chunk's document."""
        return {**self._head, "object": self.chunk_kind, "choices": choices, **more}

    def places(self, grown: Grown) -> list[Place]:
        """The new tokens and their log-probabilities, if asked for."""
        delta = grown.delta
        if self.asked.top is None or not delta.logprobs:
            return []
        return list(zip(delta.token_ids, delta.logprobs, strict=True))

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        """What begins a choice's stream."""
        del index
        return iter(())

    def choice(
        self, index: int, text: str, places: list[Place], reason: str | None
    ) -> dict[str, Any]:
        """A whole choice."""
        raise NotImplementedError

    def part(
        self, index: int, text: str, places: list[Place], reason: str | None
    ) -> dict[str, Any] | None:
        """A chunk's choice; None while there is nothing to show."""
        raise NotImplementedError

    def likeliest(self, place: PlaceLogprobs) -> list[int]:
        """The likeliest tokens at a place, as many as were asked for."""
        found = [token for token, entry in place.items() if entry.rank <= (self.asked.top or 0)]
        return sorted(found, key=lambda token: place[token].rank)

    def prompt_logprobs(self, prompt: int) -> list[dict[str, Any] | None] | None:
        """vLLM's form of a prompt's log-probabilities, if asked for."""
        most = self.asked.prompt
        if most is None or prompt not in self.scores:
            return None
        return [
            None
            if place is None
            else {
                str(other): {
                    "logprob": _finite(entry.logprob),
                    "rank": entry.rank,
                    "decoded_token": self.spell(other).text,
                }
                for other, entry in place.items()
            }
            for place in self.scores[prompt]
        ]

    def _take(self, grown: Grown) -> _Choice:
        if grown.delta.prompt_logprobs is not None:
            self.scores[grown.prompt] = grown.delta.prompt_logprobs
        return self._choices.setdefault(grown.choice, _Choice())


class CompletionAnswer(Answer):
    """Of /v1/completions.

    Args:
        decode: text of an output's tokens, as it is shown.
        echo: the prompts, if they are shown before their choices.
        n: choices for each prompt.
    """

    kind = chunk_kind = "text_completion"

    def __init__(
        self,
        name: str,
        model: str,
        asked: Asked,
        spell: Spell,
        *,
        decode: Callable[[Sequence[int]], str],
        echo: Sequence[Echo] = (),
        n: int = 1,
    ):
        super().__init__(name, model, asked, spell)
        self._decode, self._echo, self._n = decode, echo, n
        self._offsets: dict[int, Offsets] = {}

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        if self._echo:
            text, places = self._before(index)
            logprobs = self._logprobs(places, self._echo[index // self._n].offsets)
            yield self._choice(index, text, logprobs, None)

    def choice(
        self, index: int, text: str, places: list[Place], reason: str | None
    ) -> dict[str, Any]:
        before, first = self._before(index)
        offsets = [*self._echo[index // self._n].offsets] if first else []
        offsets += self._next_offsets(index, places)
        found = self._choice(index, before + text, self._logprobs(first + places, offsets), reason)
        scores = self.prompt_logprobs(index // self._n)
        return found if scores is None else {**found, "prompt_logprobs": scores}

    def part(
        self, index: int, text: str, places: list[Place], reason: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(places, self._next_offsets(index, places))
        return self._choice(index, text, logprobs, reason)

    def _choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _before(self, index: int) -> tuple[str, list[Place]]:
        """What is shown of the prompt before a choice."""
        if not self._echo:
            return "", []
        prompt = index // self._n
        text, tokens, _ = self._echo[prompt]
        scores = self.scores.get(prompt) if self.asked.top is not None else None
        return text, [] if scores is None else list(zip(tokens, scores, strict=True))

    def _next_offsets(self, index: int, places: list[Place]) -> list[int]:
        if index not in self._offsets:
            start = len(self._echo[index // self._n].text) if self._echo else 0
            self._offsets[index] = Offsets(self._decode, start)
        return self._offsets[index].of(token for token, _ in places)

    def _logprobs(self, places: list[Place], offsets: Sequence[int]) -> dict[str, Any] | None:
        if not places:
            return None
        return {
            "tokens": [self.spell(token).text for token, _ in places],
            "token_logprobs": [
                None if place is None else _finite(place[token].logprob) for token, place in places
            ],
            "top_logprobs": [place and self._top(token, place) for token, place in places],
            "text_offset": list(offsets),
        }

    def _top(self, chosen: int, place: PlaceLogprobs) -> dict[str, float]:
        """The likeliest tokens, and the chosen one where it is none of them."""
        shown = dict.fromkeys([*self.likeliest(place), chosen])
        return {self.spell(token).text: _finite(place[token].logprob) for token in shown}


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def whole(self, generation: Generation) -> dict[str, Any]:
        scores = self.prompt_logprobs(0)
        more = {} if scores is None else {"prompt_logprobs": scores}
        return {**super().whole(generation), **more}

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        yield {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(
        self, index: int, text: str, places: list[Place], reason: str | None
    ) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, **self._form(index, places, reason)}

    def part(
        self, index: int, text: str, places: list[Place], reason: str | None
    ) -> dict[str, Any] | None:
        delta = {"content": text} if text or reason is None else {}
        return {"delta": delta, **self._form(index, places, reason)}

    def _form(self, index: int, places: list[Place], reason: str | None) -> dict[str, Any]:
        found = [self._logprob(token, place) for token, place in places if place is not None]
        logprobs = {"content": found} if found else None
        return {"index": index, "logprobs": logprobs, "finish_reason": reason}

    def _logprob(self, token: int, place: PlaceLogprobs) -> dict[str, Any]:
        def entry(token: int) -> dict[str, Any]:
            text, raw = self.spell(token)
            value = _finite(place[token].logprob)
            return {"token": text, "logprob": value, "bytes": None if raw is None else list(raw)}

        return {**entry(token), "top_logprobs": [entry(t) for t in self.likeliest(place)]}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _LEAST
