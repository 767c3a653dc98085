"""What decides which request comes next: the protocol of scheduling policies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fusedkv_jax.serving.request import Request

if TYPE_CHECKING:
    from fusedkv_jax.serving.memory import PagedMemory

How = Literal["recompute", "swap", "keep"]


@dataclass
class View:
    """What a policy sees.

    Attributes:
        memory: who holds which page.
        running: requests that hold pages.
        waiting: requests that wait, by arrival.
        now: seconds.
        seconds_per_token: what computing a token of a prompt takes, as far as has been seen.
        seconds_per_page: what copying a page between host and device takes.
    """

    memory: PagedMemory
    running: Sequence[Request]
    waiting: Sequence[Request]
    now: float = 0.0
    seconds_per_token: float = 1e-4
    seconds_per_page: float = 1e-4


class Policy:
    """First come, first served, unless a subclass says otherwise.

    Attributes:
        preemptive: a waiting request that comes before a running one takes its place; otherwise
            running requests stop only where memory is short.
    """

    preemptive = False

    def order(self, queue: Sequence[Request], view: View) -> Iterable[Request]:
        """The requests of a queue, first to be served first; may be a generator.

        Who is left out has no part in this step, and in the end each must have one.

        Args:
            queue: the running requests, or the waiting ones; both if `preemptive`.
            view: all else.
        """
        return queue

    def victim(self, running: Sequence[Request], view: View) -> Request:
        """Which of `running` gives up its pages: by default whoever arrived last."""
        return max(running, key=lambda request: request.arrival)

    def next_victims(self, view: View) -> Iterable[Request]:
        """Running requests that will give up their pages soon, the next one first.

        Their pages are written to host memory beside the steps, so that none has to wait for it.
        """
        return ()

    def how(self, request: Request, view: View) -> How:
        """What becomes of the pages of a victim, or of a request that calls a tool.

        "keep" is for tool calls only. Where host memory has no room, "swap" is "recompute".
        """
        return "recompute"

    def budget(self, request: Request, view: View) -> int | None:
        """The most tokens of it in this step; None for no limit."""
        return None

    def admits(self, request: Request, view: View) -> bool:
        """Whether a waiting request may start now; if not, nor may those behind it."""
        return True

    # What happens to requests, for policies that keep accounts.

    def arrived(self, request: Request, view: View) -> None:
        """It joined the queue; again after it was preempted or a tool has answered."""

    def admitted(self, request: Request, view: View) -> None:
        """It was given pages."""

    def progressed(self, request: Request, computed: int, generated: int, seconds: float) -> None:
        """A step of so many seconds computed tokens of it, and generated none, one, or those that
        were drafted rightly and one more."""

    def finished(self, request: Request, view: View) -> None:
        """It ended, or was aborted."""
