"""Calls of tools that a client insists on: the form of the answer, and the calls in its text."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec

from fusedkv_jax.generation.structured import StructuredOutputsError, StructuredOutputsParams
from fusedkv_jax.server.errors import ApiError

_SHARED = ("$defs", "definitions")  # of a schema, which references name from its root


@dataclass(frozen=True)
class ForcedCalls:
    """What an answer must consist of.

    Attributes:
        functions: parameters, a JSON schema, by name of those that may be called.
        named: the client has named the one function, so the text is its arguments alone; otherwise
            it is an array of objects with `name` and `arguments`.
        parallel: there may be several calls.
    """

    functions: Mapping[str, dict[str, Any]]
    named: bool
    parallel: bool = True

    @classmethod
    def of(
        cls,
        tools: Sequence[Mapping[str, Any]] | None,
        choice: str | Mapping[str, Any] | None,
        parallel: bool,
    ) -> ForcedCalls | None:
        """What a request insists on; None where the model may choose.

        Raises:
            ApiError: a choice or a tool that is none.
        """
        if choice in (None, "auto", "none"):
            return None
        if choice == "required":
            return cls(_functions(tools), named=False, parallel=parallel)
        chosen = choice.get("function") if isinstance(choice, Mapping) else None
        name = chosen.get("name") if isinstance(chosen, Mapping) else None
        if not isinstance(name, str):
            wanted = 'use auto, none, required or {"type": "function", "function": {"name": ...}}'
            _refuse("tool_choice", f"tool_choice={choice!r:.100}; {wanted}")
        functions = _functions(tools)
        if name not in functions:
            _refuse(
                "tool_choice", f"tool_choice names {name!r:.100}; tools has {', '.join(functions)}"
            )
        return cls({name: functions[name]}, named=True)

    def form(self) -> StructuredOutputsParams:
        """What the output is held to, without whitespace, of which a model might never tire."""
        if self.named:
            (schema,) = self.functions.values()
        else:
            schema = self._array()
        try:
            return StructuredOutputsParams(json=schema, disable_any_whitespace=True)
        except StructuredOutputsError as error:
            raise ApiError(400, f"tools: {error}", param="tools") from None

    def _array(self) -> dict[str, Any]:
        calls, shared = [], {}
        for name, parameters in self.functions.items():
            for key in _SHARED:
                found = parameters.get(key, {})
                if not isinstance(found, Mapping):
                    _refuse("tools", f"tools have {key} that are no mapping")
                known = shared.setdefault(key, {})
                for title in found.keys() & known.keys():
                    if found[title] != known[title]:
                        _refuse("tools", f"tools define {key}/{title} in two ways; rename one")
                known |= found
            own = {key: value for key, value in parameters.items() if key not in _SHARED}
            call = {"type": "object", "properties": {"name": {"const": name}, "arguments": own}}
            required = ["name", "arguments"]
            calls.append(call | {"required": required, "additionalProperties": False})
        most = {} if self.parallel else {"maxItems": 1}
        schema = {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}}
        return schema | {key: value for key, value in shared.items() if value}

    def reader(self) -> CallReader:
        """What finds the calls in the text of a choice."""
        return CallReader(next(iter(self.functions)) if self.named else None)


class _Elements:
    """Finds the whole objects of a JSON array whose text comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._element = 0, ""
        self._quoted = self._escaped = False

    def push(self, text: str) -> Iterator[str]:
        """The objects that end in the next piece of text."""
        for letter in text:
            self._element += letter
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = letter == "\\", letter != '"'
            elif letter == '"':
                self._quoted = True
            elif letter in "[{":
                self._depth += 1
                if self._depth <= 2:
                    self._element = letter
            elif letter in "]}":
                self._depth -= 1
                if self._depth == 1:
                    yield self._element


class _Call(msgspec.Struct):
    """An element of the array; arguments stay as they are written: 1e999 is a number of JSON, and
    an infinity is none."""

    name: str
    arguments: msgspec.Raw


@dataclass
class CallReader:
    """Finds calls in a text that comes in pieces.

    Attributes:
        named: the function whose arguments the text is; None for an array of calls.
        calls: how many have begun.
    """

    named: str | None
    calls: int = 0
    _array: _Elements = field(default_factory=_Elements)

    def push(self, text: str) -> Iterator[dict[str, Any]]:
        """OpenAI's `tool_calls` of a chunk, for the next piece of text."""
        if self.named is None:
            for element in self._array.push(text):
                call = msgspec.json.decode(element, type=_Call)
                yield self._begin(call.name, bytes(call.arguments).decode())
        elif not self.calls:
            yield self._begin(self.named, text)
        elif text:
            yield {"index": 0, "function": {"arguments": text}}

    def _begin(self, name: str, arguments: str) -> dict[str, Any]:
        self.calls += 1
        return {
            "index": self.calls - 1,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }


def _functions(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """Parameters of the functions that tools are. Raises ApiError."""
    if not tools:
        _refuse("tools", "tool_choice asks for a call, and there are no tools; give some")
    found = {}
    for number, tool in enumerate(tools):
        function = tool.get("function")
        function = function if isinstance(function, Mapping) else {}
        name = function.get("name")
        if tool.get("type") != "function" or not isinstance(name, str):
            _refuse("tools", f"tools[{number}] is no function with a name")
        parameters = function.get("parameters")
        if parameters is None:  # of a function without any
            parameters = {"properties": {}, "additionalProperties": False}
        if not isinstance(parameters, Mapping):
            _refuse("tools", f"tools[{number}]: parameters are no JSON schema")
        if name in found:
            _refuse("tools", f"tools name {name!r} twice; rename one")
        found[name] = {"type": "object", **parameters}
    return found


def _refuse(param: str, message: str) -> NoReturn:
    raise ApiError(400, message, param=param)
