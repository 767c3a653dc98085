"""The engine: requests go in, steps run, tokens come out."""

from __future__ import annotations

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
from fusedkv_jax.serving.intake import AnyPrompt, Intake, Whose
from fusedkv_jax.serving.job import Job
from fusedkv_jax.serving.jobs import Deltas, Jobs, Taken
from fusedkv_jax.serving.output import EngineStats, OutputDelta
from fusedkv_jax.serving.page_runner import PageRunner
from fusedkv_jax.serving.plan import StepPlan
from fusedkv_jax.serving.request import Request
from fusedkv_jax.serving.runner import Runner, RunningStep, StepResult
from fusedkv_jax.serving.scheduler import Scheduler
from fusedkv_jax.serving.settings import ServingSettings
from fusedkv_jax.serving.slot_runner import SlotRunner
from fusedkv_jax.serving.speculation import Drafter, NGramDrafter, NGramSpeculation, Speculation

_log = logging.getLogger(__name__)


class _Drafting(NamedTuple):
    """Who drafts, and what tells whether that pays."""

    drafter: Drafter
    switch: DraftSwitch


class _Flight(NamedTuple):
    """A step that the device computes.

    Attributes:
        plan: what it computes.
        positions: of the first token that it draws for each request.
        start: when it was planned.
        running: tells what it gives.
        overlaps: the next one may be planned meanwhile.
    """

    plan: StepPlan
    positions: list[int]
    start: float
    running: RunningStep
    overlaps: bool


class Engine:
    """Serves requests by steps; for one thread.

    Args:
        model: the model.
        tokenizer: encodes prompts and decodes outputs, or None.
        settings: how it is served; by default as `ServingSettings` has it.

    Attributes:
        watch: called with the plan of every step, before it runs.

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
        self.watch: Callable[[StepPlan], None] | None = None
        self._overlaps = settings.async_scheduling and self._drafting is None
        self._jobs = Jobs()
        self._flight: _Flight | None = None  # whose requests count its tokens already
        self._end_of_step = 0.0  # when the last one ended
        counts = "steps", "undrafted_steps", "drafts", "draft_tokens", "accepted_tokens"
        self._counts = dict.fromkeys(counts, 0)

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
        client: str | None = None,
    ) -> None:
        """Queue a request.

        Args:
            prompt: a text (with a tokenizer), or token ids.
            params: how it is decoded.
            request_id: what its deltas are called; free again when it has ended.
            priority: lower is more urgent, for policies that ask.
            tenant: whose it is; tenants share no cached prefixes.
            client: who shares fairly with others, for policies that ask; default the tenant.

        Raises:
            ValueError: it can never be served; the message names the limit.
        """
        self.put(self.check(prompt, params, request_id), request_id, priority, tenant, client)

    def put(
        self,
        prompt: Prompt,
        request_id: str,
        priority: int = 0,
        tenant: str = "",
        client: str | None = None,
    ) -> None:
        """Queue what `check` gave."""
        if self._jobs.get(request_id) is not None:
            raise ValueError(f"request {request_id!r} runs already; choose another request_id")
        now = time.monotonic()
        whose = Whose(priority, tenant, tenant if client is None else client)
        job = self._intake.job(request_id, prompt, now, whose)
        self.scheduler.add(job.outputs[0].request, now)
        self._jobs.add(job)

    def abort(self, request_id: str) -> Deltas:
        """End a request at once; its pages are free. Nothing happens if it has ended."""
        job = self._jobs.get(request_id)
        return [] if job is None else self._end(job, OutputDelta(0, finish_reason="abort"))

    @property
    def names(self) -> list[str]:
        """The requests that have not ended."""
        return self._jobs.names

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._jobs)

    def step(self) -> Deltas:
        """Schedule, run, finish: what has come of it. Nothing if nobody waits.

        Where steps overlap, this one goes on while the next call plans another, and what comes is
        that of the one before.
        """
        start = time.monotonic()
        plan = self.scheduler.schedule(start)
        before, self._flight = self._flight, None
        flight = self._start(plan, start) if plan.requests else None
        deltas, ended = Deltas(), frozenset[Request]()
        if before is not None:
            result = _result(before)
            if isinstance(result, Exception):  # this one began with what has never been
                return self._failed([before.plan, plan], result)
            taken = self._take(before, result)
            deltas, ended = taken.deltas, self._settle(before, taken, flight)
        if isinstance(flight, Exception):
            return deltas + self._failed([plan], flight)
        if flight is None:
            return deltas
        if flight.overlaps:
            tokens, now = flight.running.stand_ins, time.monotonic()
            self.scheduler.finish(plan, tokens, now, None, ended)
            self._flight = flight
            return deltas
        result = _result(flight)
        if isinstance(result, Exception):
            return deltas + self._failed([plan], result)
        return deltas + self._finish(flight, result, ended)

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
            **self._jobs.counts,
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

    def _start(self, plan: StepPlan, start: float) -> _Flight | Exception:
        """Let the device compute a plan; or why it cannot, whatever it is, as others must go on."""
        positions = [request.length for request in plan.requests]
        draws = [self._jobs.draw(request) for request in plan.requests]
        overlaps = self._overlaps and not any(map(_decides, draws))
        try:
            if self._drafting is not None and any(plan.room):
                self._draft(self._drafting, plan, draws)
            if self.watch is not None:
                self.watch(plan)
            running = self.runner.start(plan, draws)
        except Exception as error:
            return error
        return _Flight(plan, positions, start, running, overlaps)

    def _take(self, flight: _Flight, result: StepResult) -> Taken:
        """Take in what a step has given, for the callers; the scheduler has to be told."""
        plan, now = flight.plan, time.monotonic()
        seconds = now - max(flight.start, self._end_of_step)
        self._end_of_step = now
        if self._drafting is not None and any(plan.room):
            tokens = sum(map(len, result.drawn))
            self._drafting.switch.took(len(plan.requests), bool(plan.drafts), seconds, tokens)
        if self._jobs.of(plan.requests):  # else the engine may have been idle since it was over
            self.scheduler.took(plan, seconds)
        self._jobs.keep_scores(plan, result.scores)
        self._counts["steps"] += 1
        return self._jobs.take(plan, flight.positions, result.drawn, self.runner.fork)

    def _settle(
        self, flight: _Flight, taken: Taken, following: _Flight | Exception | None
    ) -> frozenset[Request]:
        """Tell the scheduler what has come of a step whose tokens it has counted.

        Returns:
            Requests that have ended with it and are a part of the step that follows, for nothing.
        """
        for request, position, token in zip(
            flight.plan.requests, flight.positions, taken.tokens, strict=True
        ):
            if token is not None:
                # Where nothing could be drawn, the step that follows computes token 0.
                request.outputs[position - len(request.prompt)] = max(token, 0)
        runs = set(following.plan.requests) if isinstance(following, _Flight) else set()
        now = time.monotonic()
        for request in taken.ended:
            self._jobs.forget(request)
            if request not in runs:
                self.scheduler.abort(request, now)
        return frozenset(taken.ended & runs)

    def _finish(self, flight: _Flight, result: StepResult, void: frozenset[Request]) -> Deltas:
        """Tell the scheduler what has come of a step; nothing for requests that had ended."""
        plan, taken = flight.plan, self._take(flight, result)
        if plan.drafts:
            self._counts["accepted_tokens"] += plan.tokens - len(plan.requests)
        ended, now = void | taken.ended, time.monotonic()
        for request in self.scheduler.finish(plan, taken.tokens, now, None, ended):
            if request not in void:
                self._jobs.forget(request)
        for request, job, output, own in taken.forks:
            self._jobs.stand_for(output.request, job, output)
            self.scheduler.fork(request, output.request, own, now)
        return taken.deltas

    def _end(self, job: Job, delta: OutputDelta) -> Deltas:
        """End all outputs of a job that have not ended, with the same last delta."""
        deltas, requests = self._jobs.end(job, delta)
        now = time.monotonic()
        for request in requests:
            self.scheduler.abort(request, now)
        return deltas

    def _failed(self, plans: Sequence[StepPlan], error: Exception) -> Deltas:
        """End the jobs of steps that raised; others begin again if the pool is lost, or what should
        have been copied may be nowhere."""
        jobs = self._jobs.of(request for plan in plans for request in plan.requests)
        names = ", ".join(job.name for job in jobs)
        _log.error("a step failed; it ends the requests %s", names, exc_info=error)
        reason = f"was in a step that failed with {type(error).__name__}; the log has the cause"
        last = OutputDelta(0, finish_reason="error", error=reason)
        deltas = [delta for job in jobs for delta in self._end(job, last)]
        now = time.monotonic()
        for request in (request for plan in plans for request in plan.requests):
            self.scheduler.abort(request, now)  # who was a part of them for nothing as well
        if self.runner.lost or any(plan.copies for plan in plans):
            self.scheduler.restart(now)
            self.runner.reset()
        return deltas


def _decides(draw: TokenDraw) -> bool:
    """What comes next for a request depends on more than how many tokens it has."""
    branches = draw.params.n > 1 and draw.request.first_token is None
    return draw.constraint is not None or draw.request.scored or branches


def _result(flight: _Flight) -> StepResult | Exception:
    """What a step gives; or why it does not, whatever it is, as others must go on."""
    try:
        return flight.running.result()
    except Exception as error:
        return error


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
