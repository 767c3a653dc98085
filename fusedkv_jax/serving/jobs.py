"""The jobs of an engine: which output each of the scheduler's requests stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fusedkv_jax.serving.draws import TokenDraw
from fusedkv_jax.serving.job import Growing, Job
from fusedkv_jax.serving.output import OutputDelta
from fusedkv_jax.serving.plan import StepPlan
from fusedkv_jax.serving.request import Request
from fusedkv_jax.serving.runner import Drawn, PromptScores

Deltas = list[tuple[str, OutputDelta]]  # with the name of the job that each belongs to

# Further tokens from the logits of a sampled row, for outputs of the same prompt.
Forker = Callable[[int, Sequence[TokenDraw]], list[Drawn]]


@dataclass
class Taken:
    """What has come of a step.

    Attributes:
        deltas: for the callers.
        tokens: the last token of each request of the step; None where none was drawn.
        ended: requests that end with it.
        forks: requests whose prompt has further outputs, with one of them and its token.
    """

    deltas: Deltas
    tokens: list[int | None]
    ended: set[Request] = field(default_factory=set)
    forks: list[tuple[Request, Job, Growing, list[int]]] = field(default_factory=list)


class Jobs:
    """What callers have asked for, until it has ended.

    Attributes:
        counts: figures since the start.
    """

    def __init__(self) -> None:
        self.counts = dict.fromkeys(
            ("prompt_tokens", "generated_tokens", "prefix_hits", "prefix_queries"), 0
        )
        self._jobs: dict[str, Job] = {}
        self._outputs: dict[Request, tuple[Job, Growing]] = {}  # that the scheduler knows

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def names(self) -> list[str]:
        """Those that have not ended."""
        return list(self._jobs)

    def get(self, name: str) -> Job | None:
        """The job of a name."""
        return self._jobs.get(name)

    def add(self, job: Job) -> Request:
        """A new job; its first output's request alone runs until the prompt is computed."""
        self._jobs[job.name] = job
        return self.stand_for(job.outputs[0].request, job, job.outputs[0])

    def stand_for(self, request: Request, job: Job, output: Growing) -> Request:
        """Let a request stand for an output of a job."""
        output.request = request
        self._outputs[request] = job, output
        return request

    def of(self, requests: Iterable[Request]) -> list[Job]:
        """The jobs of some requests, each once."""
        found = (self._outputs[request][0] for request in requests if request in self._outputs)
        return list(dict.fromkeys(found))

    def draw(self, request: Request) -> TokenDraw:
        """How a request's next token is drawn."""
        return self._outputs[request][1].draw()

    def keep_scores(self, plan: StepPlan, found: dict[int, list[PromptScores]]) -> None:
        """Take in log-probabilities of prompts, by the requests' places in the plan."""
        for place, scores in found.items():
            request = plan.requests[place]
            job, _ = self._outputs[request]
            for each in scores:
                job.score(each.start, each.logprobs)
            request.scored = not job.is_scored  # from now on its prefix may be found

    def take(
        self,
        plan: StepPlan,
        positions: Sequence[int],
        drawn: Sequence[list[Drawn]],
        fork: Forker,
    ) -> Taken:
        """Take in what a step has drawn.

        Args:
            plan: what was run; it is told what was drafted rightly.
            positions: of the first token that was drawn for each of its requests.
            drawn: what was drawn for them. For those that have ended meanwhile it is nobody's.
            fork: draws for further outputs.
        """
        taken = Taken([], [found[-1].token if found else None for found in drawn])
        sampled = (place for place, found in enumerate(drawn) if found)
        for row, place in enumerate(sampled):
            request, found = plan.requests[place], drawn[place]
            if request not in self._outputs:
                continue
            job, output = self._outputs[request]
            members = [(output, found)]
            if positions[place] == len(request.prompt):
                others = self._begin(job, request)
                further = fork(row, [other.draw() for other in others]) if others else []
                members += zip(others, ([each] for each in further), strict=True)
            alive = []
            for member, own in members:
                delta = member.take(own, positions[place])
                taken.deltas.append((job.name, job.told(delta)))
                right = [each.token for each in own[: max(1, len(delta.token_ids))]]
                self.counts["generated_tokens"] += len(right)
                if member is output:
                    *accepted, taken.tokens[place] = right
                    if plan.drafts:
                        plan.accept(place, accepted)
                if not member.tracker.finished:
                    alive.append((member, right))
            if not alive:
                taken.ended.add(request)
                continue
            # The request that runs goes on as the first that has not ended.
            (output, right), *forks = alive
            self.stand_for(request, job, output)
            taken.tokens[place] = right[-1]
            taken.forks += [(request, job, *other) for other in forks]
        return taken

    def _begin(self, job: Job, request: Request) -> list[Growing]:
        """The prompt of a job is computed; its outputs but the first."""
        job.cached = request.cached or 0
        self.counts["prompt_tokens"] += len(request.prompt)
        self.counts["prefix_queries"] += len(request.prompt)
        self.counts["prefix_hits"] += job.cached
        return job.outputs[1:]

    def end(self, job: Job, delta: OutputDelta) -> tuple[Deltas, list[Request]]:
        """End all outputs of a job that have not ended, with the same last delta; those of their
        requests that the scheduler knows."""
        deltas: Deltas = []
        requests = []
        for output in job.live:
            own = dataclasses.replace(delta, index=output.tracker.index)
            deltas.append((job.name, job.told(own)))
            if self._outputs.pop(output.request, None) is not None:
                requests.append(output.request)
        del self._jobs[job.name]
        return deltas, requests

    def forget(self, request: Request) -> None:
        """A request has ended."""
        job, _ = self._outputs.pop(request)
        if not job.live:
            self._jobs.pop(job.name, None)  # several outputs may end in one step
