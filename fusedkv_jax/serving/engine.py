"""The engine: requests go in, steps run, tokens come out."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from flax import nnx

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.generation.requests import Codec, TokenizerLike
from fusedkv_jax.generation.requests import PreparedRequest as Prompt
from fusedkv_jax.generation.settings import check_model
from fusedkv_jax.model import Decoder
from fusedkv_jax.serving.cache_form import CacheForm
from fusedkv_jax.serving.compressed_slots import CompressedSlotRunner
from fusedkv_jax.serving.draft_switch import DraftSwitch
from fusedkv_jax.serving.draws import TokenDraw
from fusedkv_jax.serving.grammars import Grammars
from fusedkv_jax.serving.intake import AnyPrompt, Intake
from fusedkv_jax.serving.job import Growing, Job
from fusedkv_jax.serving.output import EngineStats, OutputDelta
from fusedkv_jax.serving.page_runner import PageRunner
from fusedkv_jax.serving.plan import StepPlan
from fusedkv_jax.serving.request import Request
from fusedkv_jax.serving.runner import Drawn, Runner, StepResult
from fusedkv_jax.serving.scheduler import Scheduler
from fusedkv_jax.serving.settings import ServingSettings
from fusedkv_jax.serving.slot_runner import SlotRunner
from fusedkv_jax.serving.speculation import Drafter, NGramDrafter, NGramSpeculation, Speculation

_log = logging.getLogger(__name__)

Deltas = list[tuple[str, OutputDelta]]  # with the name of the request that each belongs to


class _Drafting(NamedTuple):
    """Who drafts, and what tells whether that pays."""

    drafter: Drafter
    switch: DraftSwitch


class Engine:
    """Serves requests by steps; for one thread.

    Args:
        model: the model.
        tokenizer: encodes prompts and decodes outputs, or None.
        settings: how it is served; by default as `ServingSettings` has it.

    Attributes:
        watch: called when a step has run, with its plan and seconds, before it is taken in.

    Raises:
        ValueError: a model that is spread over several devices, or settings that do not fit it.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: TokenizerLike | None = None,
        settings: ServingSettings | None = None,
    ):
        check_model(model)
        self.settings = settings = settings or ServingSettings()
        if settings.tensor_parallel_size == 1:
            _check_one_device(model)
        self.tokenizer, self.config = tokenizer, model.config
        codec = Codec(tokenizer, settings.eos_id, settings.add_special_tokens)
        grammars = Grammars(codec, model.config.vocab_size)
        form = CacheForm.choose(model.config, settings)
        _log.info("%s", form)
        _check_speculation(form, settings.speculation, model.config)
        self.max_model_len = form.max_model_len
        self.scheduler = Scheduler(
            form.memory(settings),
            settings.make_policy(),
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=form.step_tokens(settings),
            max_model_len=self.max_model_len,
            whole_prompts=form.whole_prompts,
            draft_tokens=settings.draft_tokens,
        )
        self.runner = _runner(form, settings)(model, settings, form, grammars.words)
        self._drafting = _drafting(settings.speculation, self.runner)
        self._intake = Intake(
            model.config,
            codec,
            grammars,
            self.max_model_len,
            settings.max_logprobs,
            form.max_output_len,
        )
        self.watch: Callable[[StepPlan, float], None] | None = None
        self._jobs: dict[str, Job] = {}
        self._outputs: dict[Request, tuple[Job, Growing]] = {}  # that the scheduler knows
        self._counts = {"steps": 0, "prompt_tokens": 0, "generated_tokens": 0}
        self._counts |= {"prefix_hits": 0, "prefix_queries": 0}
        self._counts |= {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0}
        self._counts["undrafted_steps"] = 0

    def check(self, prompt: AnyPrompt, params: SamplingParams, name: str) -> Prompt:
        """The prompt as `add` takes it; touches nothing, so any thread may ask.

        Raises:
            ValueError: it can never be served; the message names the limit.
        """
        return self._intake.check(name, prompt, params)

    def prepare(self, params: SamplingParams) -> None:
        """Compile the form that outputs are held to, which `check` then finds; for any thread.

        Raises:
            ValueError: it cannot be followed.
        """
        if params.structured_outputs is not None:
            self._intake.grammars.check(params.structured_outputs)

    def add(
        self,
        prompt: AnyPrompt,
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        tenant: str = "",
    ) -> None:
        """Queue a request.

        Args:
            prompt: a text (with a tokenizer), or token ids.
            params: how it is decoded.
            request_id: what its deltas are called; free again when it has ended.
            priority: lower is more urgent, for policies that ask.
            tenant: whose it is; tenants share no cached prefixes.

        Raises:
            ValueError: it can never be served; the message names the limit.
        """
        self.put(self.check(prompt, params, request_id), request_id, priority, tenant)

    def put(self, prompt: Prompt, request_id: str, priority: int = 0, tenant: str = "") -> None:
        """Queue what `check` gave."""
        if request_id in self._jobs:
            raise ValueError(f"request {request_id!r} runs already; choose another request_id")
        now = time.monotonic()
        job = self._intake.job(request_id, prompt, now, priority, tenant)
        first = job.outputs[0]
        self.scheduler.add(first.request, now)
        self._jobs[request_id] = job
        self._outputs[first.request] = job, first

    def abort(self, request_id: str) -> Deltas:
        """End a request at once; its pages are free. Nothing happens if it has ended."""
        job = self._jobs.get(request_id)
        return [] if job is None else self._end(job, OutputDelta(0, finish_reason="abort"))

    @property
    def names(self) -> list[str]:
        """The requests that have not ended."""
        return list(self._jobs)

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._jobs)

    def step(self) -> Deltas:
        """Schedule, run, finish: what has come of it. Nothing if nobody waits."""
        start = time.monotonic()
        plan = self.scheduler.schedule(start)
        if not plan.requests:
            return []
        draws = [self._outputs[request][1].draw() for request in plan.requests]
        drafting = self._drafting if any(plan.room) else None
        try:
            if drafting is not None:
                self._draft(drafting, plan, draws)
            result = self.runner.run(plan, draws)
        except Exception as error:  # whatever it is, others must go on
            return self._failed(plan, error)
        seconds = time.monotonic() - start
        if drafting is not None:
            tokens = sum(map(len, result.drawn))
            drafting.switch.took(len(plan.requests), bool(plan.drafts), seconds, tokens)
        if self.watch is not None:
            self.watch(plan, seconds)
        self._keep_scores(plan, result)
        return self._finish(plan, result.drawn, start)

    def warm_up(self) -> int:
        """Compile the programs of all steps; their number. After it nothing is compiled."""
        self._intake.grammars.warm_up()
        return self.runner.warm_up()

    def stats(self) -> EngineStats:
        """Figures of now, and since the start."""
        memory = self.scheduler.memory
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            pages_used=memory.pool.num_pages - memory.available,
            pages_total=memory.pool.num_pages,
            page_size=memory.page_size,
            preemptions=self.scheduler.preemptions,
            lower_rows=self.runner.lower_rows,
            upper_rows=self.runner.upper_rows,
            **self._counts,
        )

    def _draft(self, drafting: _Drafting, plan: StepPlan, draws: Sequence[TokenDraw]) -> None:
        """Guess what comes next, for the step to check, where that pays."""
        if not drafting.switch.drafts(len(plan.requests)):
            self._counts["undrafted_steps"] += 1
            return
        drafts = drafting.drafter(plan, draws)
        for place, draw in enumerate(draws):
            if draw.constraint is not None:
                drafts[place] = drafts[place][: draw.constraint.allowed(drafts[place])]
        if any(drafts):
            plan.draft(drafts)
            self._counts["drafts"] += sum(map(bool, drafts))
            self._counts["draft_tokens"] += sum(map(len, drafts))

    def _finish(self, plan: StepPlan, drawn: Sequence[list[Drawn]], start: float) -> Deltas:
        """Take in what a step has drawn."""
        deltas: Deltas = []
        tokens: list[int | None] = [None] * len(drawn)
        ended, forks = set(), []
        sampled = 0
        for place, (request, found) in enumerate(zip(plan.requests, drawn, strict=True)):
            if not found:
                continue
            job, output = self._outputs[request]
            members = [(output, found)]
            if not request.generated:
                members = self._begin(job, output, found, sampled)
            sampled += 1
            alive = []
            for member, own in members:
                delta = member.take(own)
                deltas.append((job.name, job.told(delta)))
                own = [each.token for each in own[: max(1, len(delta.token_ids))]]
                self._counts["generated_tokens"] += len(own)
                if not member.tracker.finished:
                    alive.append((member, own))
            if alive:
                # The request that runs goes on as the first that has not ended.
                (output, own), *others = alive
                self._become(request, job, output)
                forks += [(request, job, *other) for other in others]
            else:
                ended.add(request)
            *right, tokens[place] = own
            if plan.drafts:
                plan.accept(place, right)
                self._counts["accepted_tokens"] += len(right)
        now = time.monotonic()
        for request in self.scheduler.finish(plan, tokens, now, now - start, frozenset(ended)):
            self._forget(request)
        for request, job, output, own in forks:
            self._outputs[output.request] = job, output
            self.scheduler.fork(request, output.request, own, now)
        self._counts["steps"] += 1
        return deltas

    def _keep_scores(self, plan: StepPlan, result: StepResult) -> None:
        """Take in log-probabilities of prompts."""
        for place, scores in result.scores.items():
            request = plan.requests[place]
            job, _ = self._outputs[request]
            for each in scores:
                job.score(each.start, each.logprobs)
            request.scored = not job.is_scored  # from now on its prefix may be found

    def _begin(
        self, job: Job, first: Growing, found: list[Drawn], row: int
    ) -> list[tuple[Growing, list[Drawn]]]:
        """The first tokens of all outputs of a job, drawn from the same logits."""
        request, others = first.request, job.outputs[1:]
        job.cached = request.cached or 0
        counts = self._counts
        counts["prompt_tokens"] += len(request.prompt)
        counts["prefix_queries"] += len(request.prompt)
        counts["prefix_hits"] += job.cached
        drawn = self.runner.fork(row, [output.draw() for output in others]) if others else []
        return [(first, found), *zip(others, ([each] for each in drawn), strict=True)]

    def _become(self, request: Request, job: Job, output: Growing) -> None:
        """Let a running request stand for an output of its job."""
        output.request = request
        self._outputs[request] = job, output

    def _end(self, job: Job, delta: OutputDelta) -> Deltas:
        """End all outputs of a job that have not ended, with the same last delta."""
        now, deltas = time.monotonic(), []
        for output in job.live:
            deltas.append(
                (job.name, job.told(dataclasses.replace(delta, index=output.tracker.index)))
            )
            if self._outputs.pop(output.request, None) is not None:
                self.scheduler.abort(output.request, now)
        del self._jobs[job.name]
        return deltas

    def _forget(self, request: Request) -> None:
        job, _ = self._outputs.pop(request)
        if not job.live:
            self._jobs.pop(job.name, None)  # several outputs may end in one step

    def _failed(self, plan: StepPlan, error: Exception) -> Deltas:
        """End the jobs of a step that raised; if it took the pool along, others begin again."""
        jobs = dict.fromkeys(self._outputs[request][0] for request in plan.requests)
        names = ", ".join(job.name for job in jobs)
        _log.error("a step failed; it ends the requests %s", names, exc_info=error)
        reason = f"was in a step that failed with {type(error).__name__}; the log has the cause"
        last = OutputDelta(0, finish_reason="error", error=reason)
        deltas: Deltas = []
        for job in jobs:
            deltas += self._end(job, last)
        if self.runner.lost:
            self.scheduler.restart(time.monotonic())
            self.runner.reset()
        return deltas


def _runner(form: CacheForm, settings: ServingSettings) -> type[Runner]:
    if form.kind == "pages":
        return PageRunner
    return SlotRunner if settings.compression is None else CompressedSlotRunner


def _check_speculation(
    form: CacheForm, speculation: Speculation | None, config: ModelConfig
) -> None:
    if speculation is None:
        return
    if form.kind == "slots":
        raise ValueError(
            f"speculation needs caches in pages, and they lie in slots: {form.reason}; leave"
            " speculation out"
        )
    speculation.check(config)


def _drafting(speculation: Speculation | None, runner: Runner) -> _Drafting | None:
    if speculation is None:
        return None
    looked_up = isinstance(speculation, NGramSpeculation)
    drafter = NGramDrafter(speculation) if looked_up else runner.draft
    return _Drafting(drafter, DraftSwitch(runner.shapes.decode_rows))


def _check_one_device(model: Decoder) -> None:
    if not jax.sharding.get_mesh().empty:
        raise ValueError(
            "a mesh is set, and an engine makes its own; leave jax.set_mesh, and say how many"
            " devices share a step with tensor_parallel_size"
        )
    arrays = (x for x in jax.tree.leaves(nnx.state(model)) if isinstance(x, jax.Array))
    devices = max(len(x.sharding.device_set) for x in arrays)
    if devices > 1:
        raise ValueError(
            f"the model is spread over {devices} devices, and the engine serves from one; load it"
            f" without a mesh, or let {devices} share a step with tensor_parallel_size={devices}"
        )
