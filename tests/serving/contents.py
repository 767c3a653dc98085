"""What is in the pages: an independent account of every token that was written and copied."""

import itertools
from collections.abc import Iterable

from fusedkv_jax.serving import Copy, Direction, Request, Scheduler, StepPlan


def tokens_of(request: Request) -> list[int]:
    return [*request.prompt.tolist(), *request.outputs]


class Contents:
    """Physical pages of device and host; a step copies, reads everything before, and writes.

    A cell holds a hash of all tokens up to its own, as keys and values depend on them.
    """

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.size = scheduler.memory.page_size
        self.device: dict[int, list] = {}
        self.host: dict[int, list] = {}
        self.told: set | None = None  # nodes that lie on the device, from what changes tell
        if scheduler.memory.caching:
            scheduler.memory.record_changes()
            self.told = set()

    def check_changes(self) -> None:
        """What is told of prefixes is what lies in pages; parents come first and leave last."""
        if self.told is None:
            return
        memory = self.scheduler.memory
        for node, stored in memory.take_changes():
            assert stored != (node in self.told)
            if stored:
                assert node.parent.parent is None or node.parent in self.told
                self.told.add(node)
            else:
                assert self.told.isdisjoint(node.children.values())
                self.told.remove(node)
        assert self.told == {node for node in memory.tree.nodes() if node.page >= 0}

    def run(self, plan: StepPlan) -> None:
        """Carry out a plan's copies and computations, and check what every request reads.

        Copies that may run beside the step run after it: it must not make a difference.
        """
        beside = (Direction.AHEAD, Direction.BEHIND)
        assert [copy.direction in beside for copy in plan.copies] == sorted(
            copy.direction in beside for copy in plan.copies
        )
        self._copy(copy for copy in plan.copies if copy.direction not in beside)
        wanted = []
        drafts = plan.drafts or [[]] * len(plan.requests)
        for request, count, guessed in zip(plan.requests, plan.counts, drafts, strict=True):
            assert 0 < count <= request.length + len(guessed) - request.computed
            assert request.computed + count <= len(request.pages) * self.size
            tokens = [*tokens_of(request), *guessed]
            cells = list(itertools.accumulate(tokens, _chained, initial=0))[1:]
            wanted.append(cells[: request.computed + count])
            for position in range(request.computed, request.computed + count):
                page = self.device.setdefault(
                    request.pages[position // self.size], [None] * self.size
                )
                page[position % self.size] = cells[position]
        for request, cells in zip(plan.requests, wanted, strict=True):
            held = [cell for page in request.pages for cell in self.device.get(page, ())]
            assert held[: len(cells)] == cells, f"request {request.name} reads wrong pages"
        self._copy(copy for copy in plan.copies if copy.direction in beside)

    def _copy(self, copies: Iterable[Copy]) -> None:
        for copy in copies:
            source, target = {
                Direction.OUT: (self.device, self.host),
                Direction.INTO: (self.host, self.device),
                Direction.AHEAD: (self.host, self.device),
                Direction.BEHIND: (self.device, self.host),
                Direction.WITHIN: (self.device, self.device),
            }[copy.direction]
            target[copy.target] = list(source[copy.source])


def _chained(before: int, token: int) -> int:
    return hash((before, token))


def check_accounts(scheduler: Scheduler) -> None:
    """Every page is free, in the tree, or held by as many requests as its count says."""
    memory = scheduler.memory
    pool = memory.pool
    held: dict[int, int] = {}
    users: dict = {}
    resident = [*scheduler.running, *(r for _, _, r in scheduler.calling if r.pages)]
    for request in resident:
        assert [node.page for node in request.nodes] == request.pages[: len(request.nodes)]
        for node in request.nodes:
            users[node] = users.get(node, 0) + 1
        for page in request.pages[len(request.nodes) :]:
            held[page] = held.get(page, 0) + 1
    for node in memory.tree.nodes():
        assert node.users == users.get(node, 0)
        assert node.page >= 0 or node.host_page >= 0, "a node without contents"
        assert node.page < 0 or node.parent.page >= 0 or node.parent.parent is None
        if node.page >= 0:
            assert node.page not in held
            held[node.page] = 1
    assert {page: pool.holders(page) for page in held} == held
    assert pool.free == pool.num_pages - len(held)
    free = [page for start, length in pool.runs() for page in range(start, start + length)]
    assert sorted(free) == sorted(set(range(pool.num_pages)) - set(held))
    if memory.host is not None:
        swapped = [r for r in scheduler.waiting if r.nodes or r.host_page >= 0]
        swapped += [r for _, _, r in scheduler.calling if not r.pages]
        pins: dict = {}
        for request in swapped:
            for node in request.nodes:
                pins[node] = pins.get(node, 0) + 1
        copies = [node for node in memory.tree.nodes() if node.host_page >= 0]
        assert all(node.pins == pins.get(node, 0) for node in copies)
        assert set(pins) <= set(copies)
        partial = [r.host_page for r in swapped if r.host_page >= 0]
        used = [*(node.host_page for node in copies), *partial]
        assert len(used) == len(set(used)) == memory.host.pool.num_pages - memory.host.pool.free
