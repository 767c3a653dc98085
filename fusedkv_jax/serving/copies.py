"""Copies of pages that a step needs, in page numbers only."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple


class Direction(Enum):
    """From where to where a page is copied, and whether the step has to wait for it."""

    OUT = "device to host"
    INTO = "host to device"
    WITHIN = "device to device"
    AHEAD = "host to device beside the step, for one that does not run yet"
    BEHIND = "device to host beside the step, of a page that may soon be dropped"


class Copy(NamedTuple):
    """A page that must be copied before the next step, in the order of the list it stands in.

    Pages are handed on at once, so a later copy may write what an earlier one reads. Copies AHEAD
    and BEHIND may run beside the step, as nothing in it writes what they read or reads what they
    write; copies BEHIND are the last of a list.
    """

    direction: Direction
    source: int
    target: int


def count_runs(copies: Iterable[Copy]) -> int:
    """Transfers that copies take: neighbors that stay neighbors go together."""
    runs, last = 0, None
    for copy in copies:
        runs += last is None or copy != Copy(last.direction, last.source + 1, last.target + 1)
        last = copy
    return runs
