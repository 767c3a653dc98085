"""The pool of pages against a plain set of free numbers."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedkv_jax.serving import Copy, Direction, PagedMemory, Request
from fusedkv_jax.serving.copies import count_runs
from fusedkv_jax.serving.pages import PagePool


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_any_sequence_of_operations_keeps_the_accounts(num_pages, seed):
    rng, pool, holders = random.Random(seed), PagePool(num_pages, 4), {}
    for _ in range(200):
        kind = rng.choice(("allocate", "allocate", "hold", "release"))
        if kind == "allocate":
            count, free = rng.randint(0, 6), num_pages - len(holders)
            after = rng.choice([None, *holders])
            pages = pool.allocate(count, after)
            assert (pages is None) == (count > free)
            for page in pages or ():
                assert 0 <= page < num_pages and page not in holders
                holders[page] = 1
        elif holders:
            page = rng.choice(list(holders))
            if kind == "hold":
                pool.hold(page)
                holders[page] += 1
            else:
                pool.release(page)
                holders[page] -= 1
                if not holders[page]:
                    del holders[page]
        free = sorted(set(range(num_pages)) - set(holders))
        assert pool.free == len(free)
        runs = pool.runs()
        assert [page for start, length in runs for page in range(start, start + length)] == free
        assert all(a + n < b for (a, n), (b, _) in zip(runs, runs[1:], strict=False)), "not joined"
        assert all(pool.holders(page) == holders.get(page, 0) for page in range(num_pages))


def test_growth_follows_its_own_pages():
    pool = PagePool(64, 16)
    first, second = pool.allocate(4), pool.allocate(4)
    for _ in range(8):
        first += pool.allocate(1, after=first[-1])
        second += pool.allocate(1, after=second[-1])
    assert [b - a for a, b in zip(first, first[1:], strict=False)] == [1] * 11
    assert [b - a for a, b in zip(second, second[1:], strict=False)] == [1] * 11


def test_runs_of_copies():
    out = [Copy(Direction.OUT, *pages) for pages in ((1, 5), (2, 6), (3, 8), (4, 9), (7, 10))]
    assert count_runs([]) == 0 and count_runs(out) == 3
    assert count_runs([*out[:1], Copy(Direction.INTO, 2, 6)]) == 2


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="num_pages=0"):
        PagePool(0, 16)
    with pytest.raises(ValueError, match="page_size=-1"):
        PagePool(4, -1)


def _request(first, count):
    return Request(f"{first}-{count}", np.arange(first, first + count), 1)


def _run(memory, first, count):
    """A prompt of so many pages is computed and ends."""
    request = _request(first, count)
    assert memory.admit(request)
    request.computed = count
    memory.commit(request)
    memory.release(request)


def test_a_prefix_deeper_than_python_recurses_is_dropped():
    memory = PagedMemory(1500, 1, host_pages=1500, reserve=0.0)
    _run(memory, 0, 1500)
    _run(memory, 5000, 1400)  # the end of the first goes to the host
    assert memory.matched(_request(0, 1501)) == 1500
    memory.forget()
    assert memory.matched(_request(0, 1501)) == 0
    assert memory.host is not None and memory.host.available == 1500


def test_of_a_prefix_on_the_host_the_end_goes_first():
    memory = PagedMemory(8, 1, host_pages=8, reserve=0.0)
    _run(memory, 0, 4)
    assert memory.admit(filler := _request(100, 8))
    memory.release(filler)
    _run(memory, 0, 8)  # its beginning has been on the host for long
    assert memory.admit(filler := _request(200, 8))
    assert memory.host is not None and memory.host.reserve(1) is not None
    assert memory.matched(_request(0, 9)) == 7


def test_a_salt_is_known_as_long_as_a_page_holds_its_tokens():
    memory = PagedMemory(4, 1)
    for number in range(20):
        request = Request(str(number), np.arange(3), 1, salt=str(number))
        assert memory.admit(request)
        request.computed = 3
        memory.commit(request)
        memory.release(request)
        assert memory.matched(Request("again", np.arange(4), 1, salt=str(number))) == 3
    assert set(memory.tree._roots) == {"18", "19"}  # four pages: one is left of the last but one
    memory.forget()
    assert not memory.tree._roots and not list(memory.tree.nodes())
