"""A request: what was asked for, and how far it has come."""

from __future__ import annotations

import enum
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fusedkv_jax.validation import check_kind, check_type

if TYPE_CHECKING:
    from fusedkv_jax.serving.prefix import Node


class RequestError(ValueError):
    """A request that cannot be served.

    Attributes:
        reason: why, without the request's name, which may be none that its sender knows.
        param: the argument that is at fault.
    """

    def __init__(self, name: str, reason: str, param: str = "prompt"):
        super().__init__(f"request {name!r} {reason}")
        self.reason, self.param = reason, param


class State(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"  # holds no pages
    RUNNING = "running"  # holds pages; a step may still pass it over
    SWAPPED = "swapped"  # its pages are in host memory
    PAUSED = "paused"  # waits for the answer of a tool
    FINISHED = "finished"


class ToolCall(NamedTuple):
    """A pause in the output while a tool runs.

    Attributes:
        after: output tokens after which the call is made.
        seconds: how long the tool takes.
        answer: tokens that are appended to the context.
    """

    after: int
    seconds: float
    answer: tuple[int, ...] = ()


@dataclass(eq=False, slots=True, weakref_slot=True)
class Request:
    """One output of one prompt.

    Attributes:
        name: its identifier.
        prompt: token ids, int32 [T].
        max_tokens: tokens of output at which it ends.
        arrival: seconds.
        client: whose request it is, for fair sharing.
        priority: lower is more urgent, as in vLLM.
        salt: requests of different salts share no pages.
        tool_calls: pauses, in order.
        scored: the logits of all its prompt are wanted, so that no prefix of it is skipped.
        outputs: tokens appended to the prompt so far: generated ones and answers of tools.
        answered: how many of them are answers of tools.
        computed: tokens whose keys and values are in its pages.
        cached: prompt tokens that were found in the prefix cache when it was first admitted.
        pages: page numbers, in order of positions.
        nodes: nodes of the prefix tree that stand for its first pages.
        host_page: host page of its last, partly filled page while it is swapped out, or -1.
        first_token, last_token: times of the first and the last generated token.
        length: tokens known so far. This and the next three are kept, as each step asks for them.
        capacity: known tokens for which it has pages that only it writes.
        due: length at which it ends or calls a tool.
        calm: up to this length it decodes, and a step does nothing but add a token to it: the page
            is there, and it neither ends nor calls a tool.
    """

    name: str
    prompt: np.ndarray
    max_tokens: int
    arrival: float = 0.0
    client: str = ""
    priority: int = 0
    salt: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    scored: bool = False
    state: State = State.WAITING
    outputs: list[int] = field(default_factory=list)
    answered: int = 0
    computed: int = 0
    cached: int | None = None
    pages: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    host_page: int = -1
    first_token: float | None = None
    last_token: float | None = None
    length: int = field(init=False)
    capacity: int = 0
    due: int = field(init=False)
    calm: int = 0
    _bytes: bytes = b""

    def __post_init__(self) -> None:
        prompt = np.asarray(self.prompt)
        if prompt.ndim != 1 or prompt.size and prompt.dtype.kind not in "iu":
            raise ValueError(
                f"request {self.name!r}: prompt is {prompt.dtype} of shape {prompt.shape}; use "
                "token ids [T]"
            )
        check_type("name", self.name, str, ValueError)
        if prompt.size and prompt.min() < 0:
            raise ValueError(
                f"request {self.name!r}: prompt holds {prompt.min()}; token ids are 0 and more"
            )
        for call in self.tool_calls:
            check_kind(f"request {self.name!r}: a tool call", call, ToolCall, "ToolCall(...)")
        if type(self.max_tokens) is not int:
            raise ValueError(
                f"request {self.name!r}: max_tokens={self.max_tokens!r}; use a whole number"
            )
        times = {"arrival": self.arrival, "priority": self.priority}
        times |= {f"tool_calls[{i}].seconds": c.seconds for i, c in enumerate(self.tool_calls)}
        for name, value in times.items():
            if not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
                raise ValueError(f"request {self.name!r}: {name}={value!r}; use a number")
        places = [call.after for call in self.tool_calls]
        if late := [place for place in places if place >= self.max_tokens]:
            raise ValueError(
                f"request {self.name!r}: a tool call after {late[0]} tokens would never be made, as"
                f" max_tokens={self.max_tokens} ends the output; raise it, or leave the call out"
            )
        if any(call.seconds < 0 or call.after < 0 for call in self.tool_calls):
            raise ValueError(f"request {self.name!r}: tool_calls have a value below 0")
        if places != sorted(places):
            raise ValueError(f"request {self.name!r}: tool_calls are not in order of `after`")
        if len(self.prompt) < 1:
            raise ValueError(f"request {self.name!r} has an empty prompt; give it at least a token")
        if self.max_tokens < 1:
            raise ValueError(f"request {self.name!r}: max_tokens={self.max_tokens}; use at least 1")
        self.prompt = np.ascontiguousarray(self.prompt, np.int32)
        self.length = len(self.prompt)
        self._set_due()

    @property
    def total(self) -> int:
        """Tokens that it can come to, answers of tools included."""
        answers = sum(len(call.answer) for call in self.tool_calls)
        return len(self.prompt) + self.max_tokens + answers

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.outputs) - self.answered

    @property
    def calls_tool(self) -> bool:
        """Whether its next tool call is due."""
        return bool(self.tool_calls) and self.generated >= self.tool_calls[0].after

    def tokens(self, start: int, count: int) -> np.ndarray | list[int]:
        """So many of its known tokens, from a position on."""
        prompt = len(self.prompt)
        if start >= prompt:
            return self.outputs[start - prompt : start - prompt + count]
        own = self.prompt[start : start + count]
        rest = self.outputs[: max(start + count - prompt, 0)]
        return np.concatenate([own, np.asarray(rest, np.int32)]) if rest else own

    def take_answer(self) -> None:
        """The tool that it has called has answered."""
        call, *later = self.tool_calls
        self.tool_calls = tuple(later)
        self.outputs += call.answer
        self.answered += len(call.answer)
        self.length += len(call.answer)
        self._set_due()

    def _set_due(self) -> None:
        pauses = [call.after for call in self.tool_calls]
        self.due = len(self.prompt) + self.answered + min([self.max_tokens, *pauses])

    def page_keys(self, first: int, stop: int, page_size: int) -> Iterator[bytes]:
        """The tokens of each full page from one up to another, as keys that compare exactly."""
        begin, end, prompt = first * page_size, stop * page_size, len(self.prompt)
        if not self._bytes:
            self._bytes = self.prompt.tobytes()
        data, step = self._bytes, 4 * page_size
        if end > prompt:
            own = self.outputs[max(begin - prompt, 0) : end - prompt]
            data = data[4 * begin :] + array("i", own).tobytes()
            begin, end = 0, end - begin
        return (data[i : i + step] for i in range(4 * begin, 4 * end, step))
