"""Runs a scheduler on a virtual clock: steps are planned as an engine would, and only timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from fusedkv_jax.serving.plan import StepPlan
from fusedkv_jax.serving.request import Request
from fusedkv_jax.serving.scheduler import Scheduler
from fusedkv_jax.serving.simulate.metrics import Record


def simulate(
    requests: Iterable[Request],
    scheduler: Scheduler,
    step_seconds: Callable[[StepPlan], float],
    watch: Callable[[StepPlan, float, float], None] | None = None,
    *,
    overlaps: bool = False,
) -> list[Record]:
    """Serve requests to their last token.

    Every request generates `max_tokens` tokens, which are its own: no later prompt contains them.

    Args:
        requests: in order of arrival; taken one by one, as their time comes.
        scheduler: an idle one.
        step_seconds: what a step takes.
        watch: called after each step with its plan, the time and what it took.
        overlaps: a step is planned when the one before begins, as an engine with
            `async_scheduling` does it; otherwise when it ends.

    Returns:
        Records of the requests, in the order in which they ended.

    Raises:
        NeverFits: a request that could not run even alone.
        ValueError: a policy that lets nobody run.
    """
    queue = iter(requests)
    coming = next(queue, None)
    records: list[Record] = []
    now, end, number = 0.0, 0.0, 0  # end: of the last step
    tokens: dict[Request, int] = {}
    while coming is not None or scheduler.unfinished:
        while coming is not None and coming.arrival <= now:
            tokens[coming] = number = number - 1  # no token of a prompt is negative
            scheduler.add(coming, now)
            coming = next(queue, None)
        plan = scheduler.schedule(now)
        if not plan.requests:
            now = min(scheduler.next_answer, math.inf if coming is None else coming.arrival)
            if now == math.inf:
                name = type(scheduler.policy).__name__
                raise ValueError(
                    f"{scheduler.unfinished} requests wait, and {name} lets none of them run; its"
                    " `order` must give each of them in the end, and where nobody runs `admits`"
                    " must let one start"
                )
            continue
        seconds = step_seconds(plan)
        begin = max(now, end)
        end = begin + seconds
        now = begin if overlaps else end
        drawn = [
            tokens[request] if sampled else None
            for request, sampled in zip(plan.requests, plan.sampled(), strict=True)
        ]
        for request in scheduler.finish(plan, drawn, end, seconds):
            del tokens[request]
            records.append(Record.of(request))
        if watch is not None:
            watch(plan, end, seconds)
    return records
