"""Recorded requests: the traces of Azure and of Mooncake, read from any path."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import lzma
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from fusedkv_jax.serving.request import Request

_BLOCK = 512  # tokens of a block of Mooncake's hash_ids
# No model has a longer context; a prompt of a line is made in memory.
_MOST_TOKENS = 10_000_000
_Line = TypeVar("_Line", str, list[str])
_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


@dataclasses.dataclass(frozen=True)
class Arrival:
    """One recorded request.

    Attributes:
        seconds: after the first one.
        input_length, output_length: tokens.
        blocks: what each 512 tokens of the prompt are, where the trace says so: equal numbers
            are equal tokens behind equal prefixes.
        client: who asked.
    """

    seconds: float
    input_length: int
    output_length: int
    blocks: tuple[int, ...] = ()
    client: str = ""


def read_trace(path: str | pathlib.Path) -> list[Arrival]:
    """Read a trace: Azure's CSV or Mooncake's JSON lines, plain or .xz, in order of time.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is neither, or a line is broken; the message names the line.
    """
    path = pathlib.Path(path)
    if not path.is_file() and path.exists():
        raise ValueError(f"{path} is not a regular file; name a file")
    opener = lzma.open if path.suffix == ".xz" else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as stream:
            assert isinstance(stream, io.TextIOBase)
            arrivals = _arrivals(path, stream)
    except (lzma.LZMAError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a trace, or is damaged: {error}") from None
    if not arrivals:
        raise ValueError(f"{path} has no requests")
    start = min(arrival.seconds for arrival in arrivals)
    moved = (dataclasses.replace(a, seconds=a.seconds - start) for a in arrivals)
    return sorted(moved, key=lambda arrival: arrival.seconds)


def _arrivals(path: pathlib.Path, stream: io.TextIOBase) -> list[Arrival]:
    first = stream.readline()
    if first.strip().split(",") == _COLUMNS:
        return list(_parsed(path, csv.reader(stream), _azure))
    if first.lstrip().startswith("{"):
        return list(_parsed(path, _chain(first, stream), _mooncake, start=1))
    raise ValueError(
        f"{path} is not a trace; it begins neither with {','.join(_COLUMNS)} nor with a"
        " JSON object of timestamp, input_length, output_length and hash_ids"
    )


def requests(arrivals: Sequence[Arrival], rate: float | None = None) -> Iterator[Request]:
    """Requests of recorded arrivals, made when they are asked for, as prompts take memory.

    Args:
        arrivals: in order of time.
        rate: requests a second: times are scaled so that the last one arrives at N / rate;
            infinity lets all arrive at once. None keeps the recorded times.

    Raises:
        ValueError: a rate that is not above 0.
    """
    if rate is not None and not rate > 0:
        raise ValueError(f"rate={rate}; use a number above 0, or None")
    last = arrivals[-1].seconds if arrivals else 0.0
    scale = 1.0 if rate is None else len(arrivals) / rate / last if last else 0.0
    unique = 1 + max((block for a in arrivals for block in a.blocks), default=-1)
    for number, arrival in enumerate(arrivals):
        blocks = arrival.blocks or (unique + number,) * -(-arrival.input_length // _BLOCK)
        yield Request(
            str(number),
            np.repeat(np.asarray(blocks, np.int32), _BLOCK)[: arrival.input_length],
            arrival.output_length,
            arrival=arrival.seconds * scale,
            client=arrival.client,
        )


def _azure(fields: list[str]) -> Arrival:
    time, context, generated = fields
    seconds = datetime.datetime.fromisoformat(time[:26]).timestamp()
    return Arrival(seconds, int(context), int(generated))


def _mooncake(line: str) -> Arrival:
    fields = json.loads(line)
    time, length, answer, blocks = (
        fields[name] for name in ("timestamp", "input_length", "output_length", "hash_ids")
    )
    for number in (length, answer, *blocks):
        if type(number) is not int:
            raise ValueError(f"{number!r} is not a whole number")
    if type(time) not in (int, float) or not math.isfinite(time):
        raise ValueError(f"timestamp {time!r} is not a number")
    if wrong := [block for block in blocks if not 0 <= block < 2**31]:
        raise ValueError(f"hash_ids hold {wrong[0]}; use 0 to 2**31 - 1, as they become tokens")
    if len(blocks) != -(-length // _BLOCK):
        raise ValueError(f"{len(blocks)} hash_ids for {length} tokens")
    return Arrival(time / 1000, length, answer, tuple(blocks))


def _parsed(
    path: pathlib.Path, lines: Iterable[_Line], parse: Callable[[_Line], Arrival], start: int = 2
) -> Iterator[Arrival]:
    for number, line in enumerate(lines, start=start):
        if not line or line == "\n":
            continue
        try:
            arrival = parse(line)
            for tokens in (arrival.input_length, arrival.output_length):
                if not 0 <= tokens <= _MOST_TOKENS:
                    raise ValueError(f"{tokens} tokens; use 0 to {_MOST_TOKENS:,}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}, line {number}: {what}") from None
        if arrival.input_length < 1 or arrival.output_length < 1:
            continue  # Azure's trace has requests without output
        yield arrival


def _chain(first: str, stream: Iterable[str]) -> Iterator[str]:
    yield first
    yield from stream
