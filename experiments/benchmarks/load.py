"""Load on a server, and figures of what came back as `vllm bench serve` defines them."""

import asyncio
import dataclasses
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import numpy as np

# Every vocabulary has these token ids, and none of the first few, which are often special.
_FIRST, _LAST = 10, 100


class Ask(NamedTuple):
    """A request: token ids of a prompt, and how many are to be generated."""

    prompt: list[int]
    max_tokens: int


# Sends a request, calls back whenever something of the answer has come, and gives the number of
# tokens that were generated.
Serve = Callable[[Ask, Callable[[], None]], Awaitable[int]]


@dataclasses.dataclass(frozen=True)
class TimedAnswer:
    """What came of one request; times in seconds.

    Attributes:
        start: when it was sent.
        pieces: when each piece of the answer came.
        prompt, generated: tokens.
    """

    start: float
    pieces: tuple[float, ...]
    prompt: int
    generated: int

    @property
    def ttft(self) -> float:
        """To the first piece."""
        return self.pieces[0] - self.start

    @property
    def latency(self) -> float:
        """To the last one."""
        return self.pieces[-1] - self.start

    @property
    def tpot(self) -> float | None:
        """For each output token after the first."""
        if self.generated < 2:
            return None
        return (self.latency - self.ttft) / (self.generated - 1)

    @property
    def gaps(self) -> list[float]:
        """Between pieces: the inter-token latencies."""
        return [after - before for before, after in itertools.pairwise(self.pieces)]


class Objectives(NamedTuple):
    """What a good answer keeps, in seconds."""

    ttft: float
    tpot: float


OBJECTIVES = Objectives(ttft=2.0, tpot=0.1)


def mixed(count: int, prompt: range, generated: range, seed: int = 0) -> list[Ask]:
    """Requests of random tokens, their lengths drawn from two ranges."""
    rng = np.random.default_rng(seed)
    return [
        Ask(rng.integers(_FIRST, _LAST, rng.choice(prompt)).tolist(), int(rng.choice(generated)))
        for _ in range(count)
    ]


async def closed_loop(serve: Serve, asks: Sequence[Ask], clients: int) -> list[TimedAnswer]:
    """So many clients, each of which sends its next request when it has its answer."""
    waiting = iter(asks)

    async def client() -> list[TimedAnswer]:
        return [await _answer(serve, ask) for ask in waiting]

    answers = await asyncio.gather(*(client() for _ in range(clients)))
    return list(itertools.chain.from_iterable(answers))


async def open_loop(
    serve: Serve, asks: Sequence[Ask], rate: float, seed: int = 0
) -> list[TimedAnswer]:
    """Requests that come by a Poisson process, whoever still waits.

    Args:
        serve: what they are sent to.
        asks: the requests.
        rate: a second; times are scaled so that the last of N comes at N / rate.
        seed: of the times.
    """
    times = np.cumsum(np.random.default_rng(seed).exponential(size=len(asks)))
    times *= len(asks) / rate / times[-1]

    async def client(ask: Ask, seconds: float) -> TimedAnswer:
        await asyncio.sleep(seconds)
        return await _answer(serve, ask)

    return await asyncio.gather(*map(client, asks, times.tolist()))


def figures(
    answers: Sequence[TimedAnswer], objectives: Objectives = OBJECTIVES
) -> dict[str, float]:
    """What a run came to: a row of a table. Rates are per second, times in milliseconds."""
    seconds = max(a.pieces[-1] for a in answers) - min(a.start for a in answers)
    generated = sum(a.generated for a in answers)
    good = sum(
        a.ttft <= objectives.ttft and (a.tpot is None or a.tpot <= objectives.tpot) for a in answers
    )
    row = {
        "requests/s": len(answers) / seconds,
        "goodput/s": good / seconds,
        "output tokens/s": generated / seconds,
        "tokens/s": (generated + sum(a.prompt for a in answers)) / seconds,
    }
    times = {
        "TTFT": [a.ttft for a in answers],
        "TPOT": [a.tpot for a in answers if a.tpot is not None],
        "ITL": list(itertools.chain.from_iterable(a.gaps for a in answers)),
    }
    for name, values in times.items():
        for percent in (50, 99):
            found = float(np.percentile(values, percent)) if values else 0.0
            row[f"{name} p{percent} ms"] = 1e3 * found
    return row


async def _answer(serve: Serve, ask: Ask) -> TimedAnswer:
    clock, pieces = asyncio.get_running_loop().time, []
    start = clock()
    generated = await serve(ask, lambda: pieces.append(clock()))
    return TimedAnswer(start, tuple(pieces), len(ask.prompt), generated)
