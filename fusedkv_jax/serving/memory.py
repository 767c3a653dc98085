"""Pages of requests: shared prefixes, growth, copy-on-write, eviction and swapping.

Paged attention's memory (arXiv 2309.06180), in page numbers only.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from fusedkv_jax.serving.copies import Copy, Direction
from fusedkv_jax.serving.pages import PagePool
from fusedkv_jax.serving.prefix import Node, PrefixChange, PrefixTree
from fusedkv_jax.serving.request import Request, State
from fusedkv_jax.serving.tiers import HostTier


class PagedMemory:
    """Who holds which page.

    A full page of a prompt is a node of the prefix tree as soon as it is computed, one of an output
    when its request ends or gives up its pages. When nobody reads it any more it stays, until room
    is needed: least recently used first, and of one prefix the last page first.

    Numbers of pages change hands at once; the copies that this needs are listed in order, and
    whoever runs the step carries them out before it.

    Args:
        num_pages: device pages.
        page_size: tokens of a page.
        host_pages: pages of the host tier; 0 for none.
        prefix_caching: keep pages that nobody reads.
        reserve: fraction of the pages that admission leaves free, for running requests to grow.

    Attributes:
        caching: `prefix_caching`.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        host_pages: int = 0,
        prefix_caching: bool = True,
        reserve: float = 0.01,
    ):
        if not 0 <= reserve < 1:
            raise ValueError(f"reserve={reserve}; use 0 to below 1")
        self.pool = PagePool(num_pages, page_size)
        self.tree = PrefixTree(page_size)
        self.host = HostTier(host_pages, page_size, self._lost_copy) if host_pages else None
        self._copies: list[Copy] = []
        self._changes: list[PrefixChange] | None = None
        self.caching = prefix_caching
        self._reserved = int(reserve * num_pages)
        self._unread: OrderedDict[Node, None] = OrderedDict()  # on the device, without users

    @property
    def page_size(self) -> int:
        return self.pool.page_size

    @property
    def available(self) -> int:
        """Pages that are free or can be made so."""
        return self.pool.free + len(self._unread)

    @property
    def largest(self) -> int:
        """Tokens that a request can come to if it is alone."""
        return (self.pool.num_pages - self._reserved) * self.page_size

    def fits(self, request: Request) -> bool:
        """Whether it could run to its end if it were alone."""
        return request.total <= self.largest

    def matched(self, request: Request) -> int:
        """Tokens that need not be computed if it is admitted now."""
        return len(self.tree.match(request)) * self.page_size

    def absent(self, request: Request) -> int:
        """Pages that it will read and that are in host memory alone."""
        return sum(node.page < 0 for node in self._known(request))

    def short(self, request: Request) -> int:
        """Pages that others must give up before it can be admitted; at most 0 for none."""
        return self._short(request, self._known(request))

    def take_copies(self) -> list[Copy]:
        """What must be copied, handed over."""
        copies, self._copies = self._copies, []
        return copies

    def record_changes(self) -> None:
        """From now on keep what becomes of prefixes, for `take_changes`.

        Raises:
            ValueError: no prefixes are kept.
        """
        if not self.caching:
            raise ValueError(
                "there are no KV events without cached prefixes; leave enable_prefix_caching on,"
                " and memory to what the model allows"
            )
        self._changes = []

    def take_changes(self) -> list[PrefixChange]:
        """What became of prefixes since the last call, in order."""
        if not self._changes:
            return []
        changes, self._changes = self._changes, []
        return changes

    def admit(self, request: Request) -> bool:
        """Give a request pages for all its known tokens, and what the prefix cache has of them.

        Nothing is changed where there are too few pages.
        """
        nodes = self._known(request)
        if self._short(request, nodes) > 0:
            return False
        resident, total = sum(node.page >= 0 for node in nodes), self._pages(request.length)
        missing = [node for node in nodes if node.page < 0]
        for node in nodes:
            self._use(node)
        for node in missing:
            self._host.pin(node)  # making room may drop copies
        before = nodes[resident - 1].page if resident else None
        fresh = self._allocate(total - resident, after=before)
        assert fresh is not None
        for node, page in zip(missing, fresh, strict=False):
            self._move(node, page)
            self._copy(Direction.INTO, node.host_page, page)
        for node in reversed(missing):
            self._host.unpin(node)
        own = fresh[len(missing) :]
        if request.state is State.SWAPPED:
            self._unswap(request, own)
        else:
            request.computed = len(nodes) * self.page_size
            if request.cached is None:
                request.cached = request.computed
        request.nodes = nodes
        request.pages = [node.page for node in nodes] + own
        request.capacity = len(request.pages) * self.page_size
        request.state = State.RUNNING
        return True

    def grow(self, request: Request, length: int) -> bool:
        """Make room for the first `length` tokens of a running request; all or nothing."""
        pages, size = request.pages, self.pool.page_size
        missing = max(-(-length // size) - len(pages), 0)
        last = request.computed // size  # the page that is written next
        shared = last < len(pages) and self.pool.holders(pages[last]) > 1
        fresh = self._allocate(missing + shared, after=pages[-1] if pages else None)
        if fresh is None:
            return False
        if shared:
            page = fresh.pop()
            self._copy(Direction.WITHIN, pages[last], page)
            self.pool.release(pages[last])
            pages[last] = page
        pages += fresh
        request.capacity = len(pages) * size
        return True

    def fork(self, request: Request, other: Request) -> None:
        """Let `other`, a copy of a running request, read the same pages."""
        for node in request.nodes:
            self._use(node)
        for page in request.pages[len(request.nodes) :]:
            self.pool.hold(page)
        assert len(request.pages) <= request.computed // self.page_size + 1, "prompt not computed"
        other.nodes, other.pages = list(request.nodes), list(request.pages)
        other.computed = request.computed
        request.capacity = other.capacity = request.computed  # the last page may be shared
        request.calm = 0
        other.state = State.RUNNING

    def commit(self, request: Request) -> None:
        """Make nodes of the pages that have become full."""
        nodes, size = request.nodes, self.pool.page_size
        full = request.computed // size
        if not self.caching or len(nodes) >= full:
            return
        parent = nodes[-1] if nodes else self.tree.root(request.salt)
        for number, key in enumerate(request.page_keys(len(nodes), full, size), start=len(nodes)):
            page = request.pages[number]
            if self.pool.holders(page) > 1:
                break  # a fork reads it too; whoever is left alone with it makes the node
            node = parent.children.get(key)
            if node is None:
                node = self.tree.add(parent, key)
            if node.page < 0:
                self._move(node, page)
                node.users = 1
            else:  # somebody computed the same meanwhile
                self._use(node)
                self.pool.release(page)
                request.pages[number] = node.page
            nodes.append(node)
            parent = node

    def release(self, request: Request) -> None:
        """Take a request's pages away; what was computed stays in the cache as long as it can."""
        if request.state is State.SWAPPED:
            self._drop_swapped(request)
        else:
            self.commit(request)
            self._leave(request.nodes)
            for page in request.pages[len(request.nodes) :]:
                self.pool.release(page)
        request.nodes, request.pages = [], []
        request.computed = request.capacity = request.calm = 0

    def swap_out(self, request: Request) -> bool:
        """Move a request to host memory, exactly as it is; False where that has no room.

        Pages that have a copy already, from the last time or of somebody else, are not written
        again.
        """
        if self.host is None or not self.caching:
            return False
        self.commit(request)
        full = request.computed // self.page_size
        if len(request.nodes) < full:
            return False  # pages shared with a fork
        partial = request.computed % self.page_size > 0
        for node in request.nodes:
            self.host.pin(node)
        missing = [node for node in request.nodes if node.host_page < 0]
        slots = self.host.reserve(len(missing) + partial)
        if slots is None:
            for node in reversed(request.nodes):
                self.host.unpin(node)
            return False
        for node, slot in zip(missing, slots, strict=False):
            node.host_page = slot
            self._copy(Direction.OUT, node.page, slot)
        if partial:
            request.host_page = slots[-1]
            self._copy(Direction.OUT, request.pages[full], slots[-1])
        self._leave(request.nodes)
        for page in request.pages[len(request.nodes) :]:
            self.pool.release(page)
        request.pages, request.capacity, request.calm = [], 0, 0
        request.state = State.SWAPPED
        return True

    def prefetch(self, requests: Iterable[Request], limit: int) -> None:
        """Load what the next requests will read from host memory, beside a step.

        CachedAttention's look-ahead: in both tiers, what they need is dropped last. Only pages are
        taken that can be had without writing any.

        Args:
            requests: those that wait, in their order.
            limit: pages that may be loaded.
        """
        if self.host is None:
            return
        wanted: list[list[Node]] = []
        for request in requests:
            if limit <= 0:
                break
            nodes = self._known(request)
            for node in nodes:
                self._use(node)  # nothing of it makes room for what follows
            wanted.append(nodes)
            missing = [node for node in nodes if node.page < 0]
            count = self._droppable(min(limit, len(missing)))
            for node, page in zip(missing, self._allocate(count, None) or (), strict=False):
                self._move(node, page)
                self._copy(Direction.AHEAD, node.host_page, page)
            limit -= count
        for nodes in reversed(wanted):  # what the first one needs is dropped last
            self._leave(nodes)
            for node in reversed(nodes):
                self.host.touch(node)

    def save(self, limit: int, victims: Iterable[Request] = ()) -> None:
        """Write the pages that will be given up next to host memory, beside a step.

        CachedAttention's asynchronous saving: no step has to wait until a page has been written.
        An eighth of the pages is kept ready so: free, or unread or a victim's and written.

        Args:
            limit: pages that may be written.
            victims: running requests that will give up their pages next.
        """
        if self.host is None:
            return
        soon = min(self.pool.num_pages, self.host.pool.num_pages) // 8
        nodes = list(itertools.islice(self._unread, soon))
        soon -= self.available
        for request in victims:
            if soon <= 0:
                break
            self.commit(request)
            nodes += request.nodes
            soon -= len(request.pages)
        for node in nodes:
            if node.host_page < 0:
                slots = self.host.reserve(1) if limit else None
                if slots is None:
                    return
                self.host.attach(node, slots[0])
                self._copy(Direction.BEHIND, node.page, slots[0])
                limit -= 1

    def forget(self) -> None:
        """Drop what no request holds from both tiers, whose contents are lost, and all copies."""
        self._copies.clear()
        while self._unread:
            node, _ = self._unread.popitem(last=False)
            self.pool.release(node.page)
            self._move(node, -1)
            if node.host_page < 0:
                self._remove(node)
        if self.host is not None:
            for page in self.host.reserve(self.host.available) or ():
                self.host.release(page)

    def _known(self, request: Request) -> list[Node]:
        """Nodes of what need not be computed for one that does not run."""
        if request.state is State.SWAPPED:
            return request.nodes
        return self.tree.match(request) if self.caching else []

    def _short(self, request: Request, nodes: Sequence[Node]) -> int:
        resident = sum(node.page >= 0 for node in nodes)
        unread = sum(node.page >= 0 and not node.users for node in nodes)
        spare = 0 if request.state is State.SWAPPED else self._reserved
        return self._pages(request.length) - resident - (self.available - unread - spare)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _allocate(self, count: int, after: int | None) -> list[int] | None:
        if count > self.pool.free:
            if count > self.available:
                return None
            while self.pool.free < count:
                self._evict()
        return self.pool.allocate(count, after)

    def _droppable(self, most: int) -> int:
        """Pages that are free, or next to be dropped and in host memory as well; up to `most`."""
        count = self.pool.free
        for node in self._unread:
            if count >= most or node.host_page < 0:
                break
            count += 1
        return min(count, most)

    def _evict(self) -> None:
        node, _ = self._unread.popitem(last=False)
        page = node.page
        self._move(node, -1)
        if self.host is not None and node.host_page >= 0:
            self.host.touch(node)  # or an old beginning would take its newer ends along
        elif self.host is not None:
            slots = self.host.reserve(1)
            if slots is not None:
                self.host.attach(node, slots[0])
                self._copy(Direction.OUT, page, slots[0])
        self.pool.release(page)
        if node.host_page < 0:
            self._remove(node)

    def _move(self, node: Node, page: int) -> None:
        """A node comes to lie in a page of the device, or in none (-1)."""
        node.page = page
        if self._changes is not None:
            self._changes.append(PrefixChange(node, page >= 0))

    def _lost_copy(self, node: Node) -> None:
        if node.page < 0:
            self._remove(node)

    def _remove(self, node: Node) -> None:
        """Take a node out of the tree; what is below cannot be matched any more."""
        below = list(node.children.values())
        for child in below:  # grows as it goes; a long prompt is deeper than Python may recurse
            below += child.children.values()
        for child in reversed(below):
            assert child.page < 0
            self._host.forget(child)
            self.tree.remove(child)
        self.tree.remove(node)

    def _use(self, node: Node) -> None:
        node.users += 1
        self._unread.pop(node, None)

    def _leave(self, nodes: Sequence[Node]) -> None:
        for node in reversed(nodes):
            node.users -= 1
            if not node.users and node.page >= 0:
                self._unread[node] = None

    def _unswap(self, request: Request, own: list[int]) -> None:
        for node in reversed(request.nodes):
            self._host.unpin(node)
        if request.host_page >= 0:
            self._copy(Direction.INTO, request.host_page, own[0])
            self._host.release(request.host_page)
            request.host_page = -1

    def _drop_swapped(self, request: Request) -> None:
        for node in reversed(request.nodes):
            self._host.unpin(node)
        if request.host_page >= 0:
            self._host.release(request.host_page)
            request.host_page = -1

    def _copy(self, direction: Direction, source: int, target: int) -> None:
        self._copies.append(Copy(direction, source, target))

    @property
    def _host(self) -> HostTier:
        assert self.host is not None  # only nodes with a copy come here
        return self.host
