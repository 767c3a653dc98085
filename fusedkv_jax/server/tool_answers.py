"""OpenAI's form of an answer that consists of calls of tools."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fusedkv_jax.server.answers import Asked, ChatAnswer, Place, Spell
from fusedkv_jax.server.tools import CallReader, ForcedCalls


class ToolAnswer(ChatAnswer):
    """Of /v1/chat/completions, where the client insists on calls.

    Args:
        name, model, asked, spell: as for `Answer`.
        calls: what it insists on.
    """

    def __init__(self, name: str, model: str, asked: Asked, spell: Spell, calls: ForcedCalls):
        super().__init__(name, model, asked, spell)
        self._calls = calls
        self._readers: dict[int, CallReader] = {}

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        delta = {"role": "assistant", "content": None}
        yield {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(
        self, index: int, text: str, places: list[Place], reason: str | None
    ) -> dict[str, Any]:
        calls = list(self._calls.reader().push(text))
        for call in calls:
            del call["index"]  # which only chunks have
        message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": calls}
        return {"message": message, **self._form(index, places, self._reason(reason))}

    def part(
        self, index: int, text: str, places: list[Place], reason: str | None
    ) -> dict[str, Any] | None:
        reader = self._readers.setdefault(index, self._calls.reader())
        calls = list(reader.push(text))
        if not calls and not places and reason is None:
            return None
        delta = {"tool_calls": calls} if calls else {}
        return {"delta": delta, **self._form(index, places, self._reason(reason))}

    def _reason(self, reason: str | None) -> str | None:
        """OpenAI ends the call of a named function with `stop`, as nothing was chosen."""
        return "tool_calls" if reason == "stop" and not self._calls.named else reason
