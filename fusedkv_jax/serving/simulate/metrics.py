"""Figures of served requests, as `vllm bench serve` defines them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fusedkv_jax.serving.request import Request


@dataclasses.dataclass(frozen=True)
class Record:
    """One request that has ended; times in seconds.

    Attributes:
        arrival: when it came.
        ttft: from then to its first token.
        latency: to its last.
        prompt, cached, generated: tokens; `cached` of the prompt were not computed.
        client: whose it was.
        tools: seconds of it that tools took.
    """

    arrival: float
    ttft: float
    latency: float
    prompt: int
    cached: int
    generated: int
    client: str = ""
    tools: float = 0.0

    @classmethod
    def of(cls, request: Request, tools: float = 0.0) -> Record:
        """The record of a request that has ended."""
        assert request.first_token is not None and request.last_token is not None
        return cls(
            arrival=request.arrival,
            ttft=request.first_token - request.arrival,
            latency=request.last_token - request.arrival,
            prompt=len(request.prompt),
            cached=request.cached or 0,
            generated=request.generated,
            client=request.client,
            tools=tools,
        )

    @property
    def tpot(self) -> float | None:
        """Seconds for each output token after the first."""
        if self.generated < 2:
            return None
        return (self.latency - self.ttft) / (self.generated - 1)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run came to; times in seconds, rates per second.

    Attributes:
        requests: how many ended.
        seconds: from the first arrival to the last token.
        request_rate, output_rate: requests and generated tokens a second.
        goodput: requests a second that met both objectives.
        attained: fraction of the requests that did.
        mean_latency: from arrival to the last token.
        ttft, tpot: 50th, 90th and 99th percentiles.
        hit_rate: fraction of the prompt tokens that were in the cache.
        computed: prompt tokens that were not.
        preemptions: how often a request gave up its pages.
        steps: of the engine.
    """

    requests: int
    seconds: float
    request_rate: float
    output_rate: float
    goodput: float
    attained: float
    mean_latency: float
    ttft: tuple[float, float, float]
    tpot: tuple[float, float, float]
    hit_rate: float
    computed: int
    preemptions: int = 0
    steps: int = 0


def summarize(
    records: Sequence[Record],
    *,
    ttft_slo: float | None = None,
    tpot_slo: float | None = None,
    preemptions: int = 0,
    steps: int = 0,
) -> Summary:
    """Put the records of a run together.

    Args:
        records: at least one.
        ttft_slo, tpot_slo: objectives in seconds, None for none.
        preemptions, steps: of the engine, handed on.
    """
    start = min(record.arrival for record in records)
    seconds = max(record.arrival + record.latency for record in records) - start
    tpot = [record.tpot for record in records if record.tpot is not None]
    good = sum(
        (ttft_slo is None or record.ttft <= ttft_slo)
        and (tpot_slo is None or record.tpot is None or record.tpot <= tpot_slo)
        for record in records
    )
    prompt, cached = (sum(getattr(r, name) for r in records) for name in ("prompt", "cached"))
    return Summary(
        requests=len(records),
        seconds=seconds,
        request_rate=len(records) / seconds,
        output_rate=sum(record.generated for record in records) / seconds,
        goodput=good / seconds,
        attained=good / len(records),
        mean_latency=float(np.mean([record.latency for record in records])),
        ttft=_percentiles([record.ttft for record in records]),
        tpot=_percentiles(tpot),
        hit_rate=cached / prompt,
        computed=prompt - cached,
        preemptions=preemptions,
        steps=steps,
    )


def _percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    if not values:
        return (0.0, 0.0, 0.0)
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return float(p50), float(p90), float(p99)
