"""Host memory as a second tier of pages (CachedAttention, arXiv 2403.19708).

Pages that leave the device are written here, and come back instead of being computed again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from fusedkv_jax.serving.pages import PagePool
from fusedkv_jax.serving.prefix import Node


class HostTier:
    """Copies of nodes of the prefix tree, and of last pages that are not full yet.

    What no swapped-out request needs is dropped, least recently used first. Nodes below are
    older than nodes above, so that what is left of a prefix can still be matched.

    Args:
        num_pages: host pages.
        page_size: tokens of a page.
        dropped: called with a node that has lost its copy.
    """

    def __init__(self, num_pages: int, page_size: int, dropped: Callable[[Node], None]):
        self.pool = PagePool(num_pages, page_size)
        self._unpinned: OrderedDict[Node, None] = OrderedDict()
        self._dropped = dropped

    @property
    def available(self) -> int:
        """Pages that are free or can be made so."""
        return self.pool.free + len(self._unpinned)

    def reserve(self, count: int) -> list[int] | None:
        """Host pages, dropping old copies where it must; None where there are too few."""
        if count > self.available:
            return None
        while self.pool.free < count:
            node, _ = self._unpinned.popitem(last=False)
            self.pool.release(node.host_page)
            node.host_page = -1
            self._dropped(node)
        return self.pool.allocate(count)

    def release(self, page: int) -> None:
        """Give back a page that belongs to no node."""
        self.pool.release(page)

    def attach(self, node: Node, page: int) -> None:
        """A reserved page becomes the copy of a node."""
        assert node.host_page < 0
        node.host_page = page
        self._unpinned[node] = None

    def pin(self, node: Node) -> None:
        """A swapped-out request needs the copy."""
        node.pins += 1
        self._unpinned.pop(node, None)

    def unpin(self, node: Node) -> None:
        """The request needs it no more."""
        node.pins -= 1
        if not node.pins and node.host_page >= 0:
            self._unpinned[node] = None

    def touch(self, node: Node) -> None:
        """The copy will be used: drop others first."""
        if node in self._unpinned:
            self._unpinned.move_to_end(node)

    def forget(self, node: Node) -> None:
        """Drop a copy now."""
        assert not node.pins
        del self._unpinned[node]
        self.pool.release(node.host_page)
        node.host_page = -1
