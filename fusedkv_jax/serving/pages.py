"""Which pages of a pool are free; runs of neighbors are kept together.

Few long runs make swapping few large copies (FastSwitch, arXiv 2411.18424), so a request grows
in place where it can, and starts in the middle of the largest run, where it has most room to.
"""

from __future__ import annotations

import heapq


class PagePool:
    """Page numbers 0 to num_pages - 1.

    Attributes:
        num_pages: pages in all.
        page_size: tokens that a page holds.
        free: pages that nobody holds.
    """

    def __init__(self, num_pages: int, page_size: int):
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}; use a whole number of at least 1")
        self.num_pages, self.page_size = num_pages, page_size
        self.free = num_pages
        self._holders = [0] * num_pages
        self._length = {0: num_pages}  # of the free run that starts at a page
        self._start = {num_pages: 0}  # of the free run that ends before a page
        # A heap of (-length, end) of free runs. Lengths are put right when their turn comes.
        self._largest = [(-num_pages, num_pages)]

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """Pages with one holder each, or None where there are too few.

        Args:
            count: how many.
            after: the page that the first one should follow.
        """
        if count > self.free:
            return None
        pages: list[int] = []
        while len(pages) < count:
            wanted = count - len(pages)
            before = pages[-1] if pages else after
            if before is not None and before + 1 in self._length:
                pages += self._take(before + 1, wanted, 0)
            else:
                start = self._largest_run()
                spare = self._length[start] - wanted
                # The middle of a run leaves room for whoever ends before it. The first one stays.
                pages += self._take(start, wanted, spare // 2 if start and spare > 1 else 0)
        for page in pages:
            self._holders[page] = 1
        self.free -= count
        return pages

    def hold(self, page: int) -> None:
        """One holder more, of a page that is held."""
        assert self._holders[page] > 0, page
        self._holders[page] += 1

    def holders(self, page: int) -> int:
        """How many hold a page."""
        return self._holders[page]

    def release(self, page: int) -> None:
        """One holder fewer; without any the page is free."""
        assert self._holders[page] > 0, page
        self._holders[page] -= 1
        if self._holders[page]:
            return
        self.free += 1
        start, stop = page, page + 1
        if page in self._start:  # a run ends here
            start = self._start.pop(page)
        if stop in self._length:  # a run starts behind
            stop += self._length.pop(stop)
        self._add(start, stop)

    def runs(self) -> list[tuple[int, int]]:
        """(start, length) of the free runs, in order."""
        return sorted(self._length.items())

    def _largest_run(self) -> int:
        while True:
            length, stop = self._largest[0]
            start = self._start.get(stop)
            if start is None:
                heapq.heappop(self._largest)
            elif stop - start < -length:  # its first pages were taken since
                heapq.heapreplace(self._largest, (start - stop, stop))
            else:
                return start

    def _take(self, start: int, wanted: int, skipped: int) -> range:
        """Up to `wanted` pages of the free run at `start`, behind its first `skipped`."""
        stop = start + self._length.pop(start)
        first, last = start + skipped, min(start + skipped + wanted, stop)
        if last < stop:
            self._length[last], self._start[stop] = stop - last, last
        else:
            del self._start[stop]
        if first > start:
            self._add(start, first)
        return range(first, last)

    def _add(self, start: int, stop: int) -> None:
        self._length[start], self._start[stop] = stop - start, start
        heapq.heappush(self._largest, (start - stop, stop))
        if len(self._largest) > 64 + 4 * len(self._length):
            self._largest = [(first - end, end) for end, first in self._start.items()]
            heapq.heapify(self._largest)
