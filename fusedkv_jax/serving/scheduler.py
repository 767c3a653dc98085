"""The scheduler: who computes how many tokens in the next step. It knows no policy by name."""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import get_args

from fusedkv_jax.serving.memory import PagedMemory
from fusedkv_jax.serving.plan import StepPlan
from fusedkv_jax.serving.policy import How, Policy, View
from fusedkv_jax.serving.request import Request, RequestError, State
from fusedkv_jax.validation import check_kind


class NeverFits(RequestError):
    """A request that could not run even alone; the message names the limit."""


class Scheduler:
    """Requests in a queue, and requests that hold pages.

    A step computes at most `max_num_batched_tokens` tokens of at most `max_num_seqs` requests:
    decoding ones with a token each, and of prompts a chunk (Sarathi, arXiv 2308.16369). The
    caller runs the plan and hands back what was generated.

    Args:
        memory: pages.
        policy: who comes first.
        max_num_seqs: requests in a step.
        max_num_batched_tokens: tokens in a step.
        max_model_len: tokens that a request may come to; None for what the pages hold.
        whole_prompts: a prompt is not cut, and what a request had generated before it gave up its
            pages comes again token by token: what is computed depends on it.
        look_ahead: waiting requests whose pages are loaded from host memory in advance; with 0
            they come when it starts, and the step waits for them.
        seconds_per_page: what copying a page between host and device takes, for policies.
        draft_tokens: tokens that may be drafted for each request, in steps in which all decode.
    """

    def __init__(
        self,
        memory: PagedMemory,
        policy: Policy,
        *,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        whole_prompts: bool = False,
        look_ahead: int = 16,
        seconds_per_page: float = 1e-4,
        draft_tokens: int = 0,
    ):
        for name, value, kind in (("memory", memory, PagedMemory), ("policy", policy, Policy)):
            if not isinstance(value, kind):
                raise ValueError(f"{name}={value!r}; use a {kind.__name__}")
        counts = {"max_num_seqs": (max_num_seqs, 1), "look_ahead": (look_ahead, 0)}
        counts["draft_tokens"] = draft_tokens, 0
        if max_model_len is not None:
            counts["max_model_len"] = (max_model_len, 1)
        for name, (value, least) in counts.items():
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r}; use a whole number of at least {least}")
        if not 0 <= seconds_per_page < math.inf:
            raise ValueError(f"seconds_per_page={seconds_per_page}; use 0 or more")
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={max_num_batched_tokens} is below"
                f" max_num_seqs={max_num_seqs}, so not all could decode; raise it"
            )
        self.memory, self.policy = memory, policy
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.max_model_len, self.look_ahead = max_model_len, look_ahead
        self.whole_prompts, self.draft_tokens = whole_prompts, draft_tokens
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.calling: list[tuple[float, str, Request]] = []  # a heap: until when a tool runs
        self.preemptions = 0
        self._plan = StepPlan()  # the step that is being put together
        self._admitted: set[Request] = set()
        self._evicted: set[Request] = set()
        # Who will start when its pages have come from host memory, and how many are missing.
        self._awaited: dict[Request, int] = {}
        self._awaited_before: dict[Request, int] = {}
        self._seconds = self._lasted = 0.0  # of the shortest of the last steps, and of the last
        self._accounts = type(policy).progressed is not Policy.progressed
        self.view = View(memory, self.running, self.waiting, seconds_per_page=seconds_per_page)

    def add(self, request: Request, now: float) -> None:
        """Queue a request.

        Raises:
            NeverFits: it can come to more tokens than the model or the pages hold.
        """
        check_kind("request", request, Request, "a Request")
        if self.max_model_len is not None and request.total > self.max_model_len:
            raise NeverFits(
                request.name,
                f"can come to {request.total} tokens, the model's context holds"
                f" {self.max_model_len}; shorten the prompt or lower max_tokens",
            )
        if not self.memory.fits(request):
            size = self.memory.page_size
            raise NeverFits(
                request.name,
                f"can come to {request.total} tokens, the cache holds"
                f" {self.memory.pool.num_pages} pages of {size}; shorten it or enlarge the cache",
            )
        if request.state is not State.WAITING or any(each is request for each in self.waiting):
            raise ValueError(f"request {request.name!r} was added before; make a new one")
        self.view.now = now
        self._queue(request)

    def abort(self, request: Request, now: float) -> None:
        """Drop a request, wherever it stands; nothing if it has ended."""
        if request.state is State.FINISHED:
            return
        self.view.now = now
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.running:
            self.running.remove(request)
        self.calling = [entry for entry in self.calling if entry[2] is not request]
        heapq.heapify(self.calling)
        self._end(request)

    def fork(self, request: Request, other: Request, outputs: list[int], now: float) -> None:
        """Let a new request go on from a running one whose prompt has been computed.

        Args:
            request: the one that runs.
            other: a request of the same prompt; it shares the pages.
            outputs: its own first tokens, drawn from the same logits.
            now: seconds.
        """
        self.view.now = now
        self.memory.fork(request, other)
        other.outputs, other.cached = list(outputs), len(other.prompt)
        other.length, other.first_token = len(other.prompt) + len(outputs), now
        self.running.append(other)
        self.policy.arrived(other, self.view)
        self.policy.admitted(other, self.view)

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self.running) + len(self.waiting) + len(self.calling)

    @property
    def next_answer(self) -> float:
        """When the next tool answers; infinity if none runs."""
        return self.calling[0][0] if self.calling else math.inf

    def schedule(self, now: float) -> StepPlan:
        """Choose the next step. An empty plan means that nothing can run now."""
        view, plan = self.view, StepPlan()
        view.now = now
        while self.calling and self.calling[0][0] <= now:
            self._answered(heapq.heappop(self.calling)[2])
        self._evicted.clear()
        self._awaited_before, self._awaited = self._awaited, {}
        self._plan = plan
        requests, counts, most = plan.requests, plan.counts, self.max_num_seqs
        queue = self._queue_order(plan)
        closed = False  # nobody starts behind one who may not
        left = self.max_num_batched_tokens - plan.calm
        for request in queue:
            if left <= 0 or len(requests) == most:
                break
            if request.computed + 1 == request.length <= request.capacity:  # nothing to decide
                requests.append(request)
                counts.append(1)
                left -= 1
                continue
            if request.state is not State.RUNNING and (closed or not self._admit(request, left)):
                if not self.policy.preemptive and request not in self._evicted:
                    break
                closed = True  # but those behind who run go on
                continue
            count = self._portion(request, left)
            end = request.computed + count
            if not count or end > request.capacity and not self._grow(request, end):
                continue
            requests.append(request)
            counts.append(count)
            left -= count
        if self._admitted:
            self.waiting[:] = [r for r in self.waiting if r not in self._admitted]
            self._admitted.clear()
        if not requests:
            return plan  # nobody runs it: copies wait for the next one
        if self.draft_tokens:
            self._make_room(plan)
        if self.memory.host is not None:
            self._copy_beside()
        plan.copies = self.memory.take_copies()
        return plan

    def finish(
        self,
        plan: StepPlan,
        tokens: Sequence[int | None],
        now: float,
        seconds: float | None,
        ended: frozenset[Request] = frozenset(),
    ) -> list[Request]:
        """Take in what a step has generated.

        Of a step that runs still, too: what comes next depends on how many tokens there are, and
        on which only by way of `ended`.

        Args:
            plan: what was run; of what was drafted, `StepPlan.accept` has told what is right.
            tokens: the next token of each of its requests, or what stands for it; None where none
                was drawn.
            now: seconds, after the step.
            seconds: what the step took; None where it runs still, and `took` will tell.
            ended: requests that end with this token, for example by a stop text.

        Returns:
            Those that have ended.
        """
        commit = self.memory.commit
        self.view.now = now
        lasted = self._lasted if seconds is None else seconds
        due: list[Request] = []  # who ends, or calls a tool
        done: list[Request] = []
        calm = plan.calm
        for request, token in zip(plan.requests[:calm], tokens[:calm], strict=True):
            assert token is not None  # they decode
            request.outputs.append(token)
            request.computed = request.length
            request.length += 1
        if ended:
            due += [request for request in plan.requests[:calm] if request in ended]
        rest = zip(plan.requests[calm:], plan.counts[calm:], tokens[calm:], strict=True)
        for request, count, token in rest:
            computed = request.computed = request.computed + count
            if request.first_token is None or count > 1 and not plan.drafts:
                commit(request)  # pages of its output follow when it leaves
            if token is not None:
                request.outputs.append(token)
                length = request.length = computed + 1  # drawn after all known ones
                if request.first_token is None:
                    request.first_token = now
                if length >= request.due or (ended and request in ended):
                    due.append(request)
                request.calm = min(request.capacity, request.due - 2)
        if self._accounts:
            for request, count, token in zip(plan.requests, plan.counts, tokens, strict=True):
                generated = count if plan.drafts else int(token is not None)
                self.policy.progressed(request, count, generated, lasted)
        for request in due:
            if request.generated >= request.max_tokens or request in ended:
                request.last_token = now
                done.append(request)
            else:
                self._call(request)
        if done:
            self.running[:] = [request for request in self.running if request not in done]
            for request in done:
                self._end(request)
        if seconds is not None:
            self.took(plan, seconds)
        return done

    def took(self, plan: StepPlan, seconds: float) -> None:
        """Take in how long a step took, for what depends on the device's pace."""
        self._lasted = seconds
        # A short step may follow a long one, and must not wait for as many copies.
        self._seconds = min(seconds, 1.01 * self._seconds or seconds)
        computed = plan.tokens
        if computed > 2 * len(plan.requests) and not plan.drafts:
            rate = seconds / computed
            self.view.seconds_per_token += 0.1 * (rate - self.view.seconds_per_token)

    def restart(self, now: float) -> None:
        """The pages are lost, in both tiers: whoever holds some computes them again."""
        self.view.now = now
        for request in list(self.running):
            self.running.remove(request)
            self._give_up(request, "recompute")
            self._queue(request)
        for request in [*self.waiting, *(request for _, _, request in self.calling)]:
            if request.state is not State.WAITING:  # swapped out, or paused
                self._give_up(request, "recompute")
        self.memory.forget()

    def _queue_order(self, plan: StepPlan) -> Iterable[Request]:
        """Requests in the policy's order; waiting ones are put in order when their turn comes.

        Where nobody will have to give up pages, those that need nothing are in the plan already.
        """
        if self.policy.preemptive:
            return list(self.policy.order(self.running + self.waiting, self.view))
        running = self.running
        restless = [request for request in running if request.length > request.calm]
        # Each of them needs two pages at most: a prompt has its pages when it is admitted.
        if 2 * len(restless) <= self.memory.available and len(running) <= self.max_num_seqs:
            plan.requests += [request for request in running if request.length <= request.calm]
            plan.calm = len(plan.requests)
            plan.counts += [1] * plan.calm
            running = restless
        return itertools.chain(list(self.policy.order(running, self.view)), self._waiting_order())

    def _waiting_order(self) -> Iterator[Request]:
        yield from self.policy.order(self.waiting, self.view)

    def _admit(self, request: Request, left: int) -> bool:
        """Give pages to a waiting request, at the cost of later ones if the policy preempts.

        Not to a prompt that is too long for the `left` tokens of the step and is not cut: it would
        hold them for nothing, and those behind it could take them away again.
        """
        if request in self._evicted or self.whole_prompts and len(request.prompt) > left:
            return False
        if not self.policy.preemptive:
            full = len(self.running) >= self.max_num_seqs
            if full or self._evicted:  # who evicts has no room for anybody new
                return False
        if not self.policy.admits(request, self.view):
            return False
        awaits = self._must_await(request)
        if self.policy.preemptive:
            self._clear(request)
        if awaits or not self.memory.admit(request):
            return False
        self.running.append(request)
        self._admitted.add(request)
        self.policy.admitted(request, self.view)
        return True

    def _clear(self, request: Request) -> None:
        """Let others give up the pages that a waiting request needs to start."""
        while self.memory.short(request) > 0 and (victims := self._victims()):
            self._evict(self._victim(victims))

    def _portion(self, request: Request, left: int) -> int:
        """How many tokens of it come next, of so many that are left; 0 for none in this step."""
        if self.whole_prompts:
            count = 1 if request.computed else len(request.prompt)
            return count if count <= left else 0
        count = request.length - request.computed
        if count > 1:
            limit = self.policy.budget(request, self.view)
            count = min(count, left, left if limit is None else limit)
        return count

    def _make_room(self, plan: StepPlan) -> None:
        """Pages for tokens to be drafted, where all decode; nobody gives up any for that."""
        requests = plan.requests
        most = min(self.draft_tokens, self.max_num_batched_tokens // len(requests) - 1)
        for request in requests:
            if request.first_token is None or request.computed + 1 != request.length:
                return
        for request in requests:
            room = max(0, min(most, request.due - request.length - 1))
            length = request.length + room
            if length > request.capacity and not self.memory.grow(request, length):
                room = request.capacity - request.length
            plan.room.append(room)

    def _must_await(self, request: Request) -> bool:
        """Its pages are loaded beside the steps of others, before it starts."""
        if self.memory.host is None or not self.look_ahead or not self._plan.requests:
            return False
        absent = self.memory.absent(request)
        if not 0 < absent < self._awaited_before.get(request, math.inf):
            return False  # all is there; or nothing came, and nothing would
        self._awaited[request] = absent
        return True

    def _copy_beside(self) -> None:
        """Load what comes next and save what goes next, as much as a step has time for."""
        memory, each = self.memory, self.view.seconds_per_page
        limit = max(1, int(0.9 * self._seconds / each)) if each else memory.pool.num_pages
        if self.look_ahead:
            memory.prefetch([*self._awaited, *self.waiting[: self.look_ahead]], limit)
        # No more has to go than comes, but for a prompt that was found in the cache.
        filled = -(-self.max_num_batched_tokens // memory.page_size)
        memory.save(min(limit, 2 * filled), self.policy.next_victims(self.view))

    def _grow(self, request: Request, length: int) -> bool:
        """Pages for more tokens of a running request, if need be those of others."""
        while request.state is State.RUNNING:
            if self.memory.grow(request, length):
                return True
            self._evict(self._victim(self._victims()))
        return False

    def _victims(self) -> list[Request]:
        """Who holds pages and is not part of this step."""
        kept = [request for _, _, request in self.calling if request.state is State.PAUSED]
        planned = set(self._plan.requests)
        return [request for request in self.running if request not in planned] + kept

    def _victim(self, victims: Sequence[Request]) -> Request:
        """Whom the policy chooses. Raises ValueError for what is none of them."""
        chosen = self.policy.victim(victims, self.view)
        if chosen not in victims:
            which = chosen.name if isinstance(chosen, Request) else chosen
            name = f"{type(self.policy).__name__}.victim"
            raise ValueError(f"{name} gave {which!r}; return one of the requests it is given")
        return chosen

    def _how(self, request: Request) -> How:
        """What becomes of its pages. Raises ValueError for a word that is none."""
        how = self.policy.how(request, self.view)
        if how not in get_args(How):
            name = f"{type(self.policy).__name__}.how"
            raise ValueError(f"{name} gave {how!r}; return {', '.join(get_args(How))}")
        return how

    def _evict(self, request: Request) -> None:
        self.preemptions += 1
        self._evicted.add(request)
        calling = request.state is State.PAUSED
        if not calling:
            self.running.remove(request)
            self._admitted.discard(request)
        self._give_up(request, self._how(request))
        if not calling:
            self._queue(request)

    def _give_up(self, request: Request, how: How) -> None:
        if how == "swap" and self.memory.swap_out(request):
            return
        self.memory.release(request)
        request.state = State.WAITING

    def _queue(self, request: Request) -> None:
        bisect.insort(self.waiting, request, key=_arrival)
        self.policy.arrived(request, self.view)

    def _call(self, request: Request) -> None:
        """Let a tool run; meanwhile the policy says where the pages are."""
        self.running.remove(request)
        how = self._how(request)
        if how == "keep":
            request.state = State.PAUSED
        else:
            self._give_up(request, how)
        until = self.view.now + request.tool_calls[0].seconds
        heapq.heappush(self.calling, (until, request.name, request))

    def _answered(self, request: Request) -> None:
        request.take_answer()
        if request.state is State.PAUSED:
            request.state = State.RUNNING
            self.running.append(request)
        else:
            self._queue(request)

    def _end(self, request: Request) -> None:
        self.memory.release(request)
        request.state = State.FINISHED
        self.policy.finished(request, self.view)


def _arrival(request: Request) -> float:
    return request.arrival
