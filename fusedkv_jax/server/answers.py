"""OpenAI's forms of what the engine makes: whole answers, chunks of a stream, log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fusedkv_jax.server.generation import Generation, Grown

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


@dataclass
class _Choice:
    """What a choice has become."""

    texts: list[str] = field(default_factory=list)
    places: list[Any] = field(default_factory=list)  # log-probabilities and their tokens
    finish_reason: str | None = None


class Answer:
    """An answer that grows.

    Args:
        name: its id.
        model: as it is served.
        created: Unix time.
        top: log-probabilities that were asked for besides the chosen token's; None for none.
        tokenizer: for the texts of tokens.
    """

    kind = chunk_kind = ""

    def __init__(self, name: str, model: str, created: int, top: int | None, tokenizer: Any):
        self._head = {"id": name, "created": created, "model": model}
        self.top, self.tokenizer = top, tokenizer
        self._choices: dict[int, _Choice] = {}

    def add(self, grown: Grown) -> None:
        """Keep what has come."""
        choice = self._choices.setdefault(grown.choice, _Choice())
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
        choice = self._choices.setdefault(grown.choice, _Choice())
        if not choice.texts:
            yield from (self.chunk([first]) for first in self.first(grown.choice))
            choice.texts.append("")
        delta, places = grown.delta, self.places(grown)
        if delta.text or places or delta.finish_reason is not None:
            yield self.chunk([self.part(grown.choice, delta.text, places, delta.finish_reason)])

    def chunk(self, choices: Sequence[Any], **more: Any) -> dict[str, Any]:
        """A chunk's document."""
        return {**self._head, "object": self.chunk_kind, "choices": choices, **more}

    def places(self, grown: Grown) -> list[Any]:
        """The new tokens and their log-probabilities, if asked for."""
        delta = grown.delta
        if self.top is None or not delta.logprobs:
            return []
        return list(zip(delta.token_ids, delta.logprobs, strict=True))

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        """What begins a choice's stream."""
        del index
        return iter(())

    def choice(self, index: int, text: str, places: list, reason: str | None) -> dict[str, Any]:
        """A whole choice."""
        raise NotImplementedError

    def part(self, index: int, text: str, places: list, reason: str | None) -> dict[str, Any]:
        """A chunk's choice."""
        raise NotImplementedError

    def spelled(self, token: int, place: Any) -> str:
        """A token's text."""
        known = place[token].decoded_token
        return self.tokenizer.decode([token], skip_special_tokens=False) if known is None else known

    def likeliest(self, place: Any) -> list[int]:
        """The likeliest tokens at a place, as many as were asked for."""
        found = [token for token, entry in place.items() if entry.rank <= (self.top or 0)]
        return sorted(found, key=lambda token: place[token].rank)


class CompletionAnswer(Answer):
    """Of /v1/completions.

    Args:
        prompts: texts before the choices of each prompt (`echo`); empty for none.
        n: choices for each prompt.
    """

    kind = chunk_kind = "text_completion"

    def __init__(self, *head: Any, prompts: Sequence[str] = (), n: int = 1):
        super().__init__(*head)
        self._prompts, self._n = prompts, n
        self._offsets: dict[int, int] = {}

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        if self._prompts:
            yield self.part(index, self._prompts[index // self._n], [], None)

    def choice(self, index: int, text: str, places: list, reason: str | None) -> dict[str, Any]:
        before = self._prompts[index // self._n] if self._prompts else ""
        return self.part(index, before + text, places, reason)

    def part(self, index: int, text: str, places: list, reason: str | None) -> dict[str, Any]:
        logprobs = self._logprobs(index, places) if places else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, places: list) -> dict[str, Any]:
        texts = [self.spelled(token, place) for token, place in places]
        offsets = []
        offset = self._offsets.get(index, 0)
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[index] = offset
        return {
            "tokens": texts,
            "token_logprobs": [_finite(place[token].logprob) for token, place in places],
            "top_logprobs": [
                {self.spelled(t, place): _finite(place[t].logprob) for t in self.likeliest(place)}
                for _, place in places
            ],
            "text_offset": offsets,
        }


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        yield {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(self, index: int, text: str, places: list, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._form(index, "message", message, places, reason)

    def part(self, index: int, text: str, places: list, reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text or reason is None else {}
        return self._form(index, "delta", delta, places, reason)

    def _form(self, index, name, value, places, reason) -> dict[str, Any]:
        logprobs = {"content": [self._logprob(*place) for place in places]} if places else None
        return {"index": index, name: value, "logprobs": logprobs, "finish_reason": reason}

    def _logprob(self, token: int, place: Any) -> dict[str, Any]:
        def entry(token: int) -> dict[str, Any]:
            text = self.spelled(token, place)
            value = _finite(place[token].logprob)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        return {**entry(token), "top_logprobs": [entry(t) for t in self.likeliest(place)]}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _LEAST
