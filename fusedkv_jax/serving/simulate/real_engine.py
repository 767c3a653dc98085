"""Serves requests by a real engine, each at its time: what `simulate` predicts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fusedkv_jax.serving.request import Request
from fusedkv_jax.serving.simulate.metrics import Record

if TYPE_CHECKING:
    from fusedkv_jax.serving.engine import Engine


def replay(engine: Engine, requests: Sequence[Request]) -> list[Record]:
    """Serve requests to their last token, at the times at which they come.

    Each generates `max_tokens` tokens greedily, whatever they are.

    Args:
        engine: an idle one that is warmed up.
        requests: in order of arrival; they are only read.

    Returns:
        Records of the requests, in the order in which they ended.

    Raises:
        ValueError: a request that can never be served.
        RuntimeError: one that failed.
    """
    begin, coming = time.monotonic(), 0
    firsts: dict[str, float] = {}
    records: list[Record] = []
    by_name = {request.name: request for request in requests}
    while len(records) < len(requests):
        while coming < len(requests) and requests[coming].arrival <= time.monotonic() - begin:
            _add(engine, requests[coming])
            coming += 1
        if not engine.unfinished:
            time.sleep(max(0.0, requests[coming].arrival - (time.monotonic() - begin)))
            continue
        deltas = engine.step()
        now = time.monotonic() - begin
        for name, delta in deltas:
            if delta.error is not None:
                raise RuntimeError(f"request {name!r} {delta.error}")
            first = firsts.setdefault(name, now)
            if delta.finish_reason is not None:
                request = by_name[name]
                records.append(
                    Record(
                        arrival=request.arrival,
                        ttft=first - request.arrival,
                        latency=now - request.arrival,
                        prompt=len(request.prompt),
                        cached=delta.cached_tokens,
                        generated=request.max_tokens,
                        client=request.client,
                    )
                )
    return records


def _add(engine: Engine, request: Request) -> None:
    from fusedkv_jax.generation.params import SamplingParams  # brings the model, as the engine does

    params = SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True)
    engine.add(
        request.prompt,
        params,
        request_id=request.name,
        priority=request.priority,
        tenant=request.client,
    )
