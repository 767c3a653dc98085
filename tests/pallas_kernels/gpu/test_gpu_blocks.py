"""Block sizes: what the table and the rule give, and how decoding is split."""

import dataclasses
import itertools

import pytest

from pallas_kernels import devices
from pallas_kernels.gpu import blocks, split_calls, static, workloads

CALL = blocks.Traits(itemsize=2, stored=2, size=128, sources=2, rows=4, simple=True)
H100 = static.target("h100")


def choose(kernel, chip=H100, **traits):
    return blocks.choose(kernel, chip, dataclasses.replace(CALL, **traits))


def test_entries_are_powers_of_two_that_say_where_they_come_from():
    assert blocks.table()
    for entry in blocks.table():
        assert entry["kernel"] in blocks.KERNELS and entry["origin"] and entry["devices"]
        for name in ("rows", "keys", "warps"):
            assert entry[name] & (entry[name] - 1) == 0
        assert min(entry["rows"], entry["keys"]) >= 16


def test_the_table_is_for_its_devices_and_the_rule_for_all_others():
    rule = blocks.heuristic("decode", 80, CALL)
    assert choose("decode", static.target("a100")) == rule
    assert choose("decode", rows=20).rows == 32
    assert choose("decode", sources=0).stages == 3
    forward, masked = choose("forward"), choose("forward", simple=False)
    assert (forward.keys, masked.keys) == (64, 32)


@pytest.mark.parametrize("chip", static.CHIPS)
@pytest.mark.parametrize("kernel", blocks.KERNELS)
def test_the_rule_has_sizes_for_whatever_the_kernels_hold(kernel, chip):
    """And smaller ones for more: wider heads, more sources, wider numbers."""
    capability = devices.GPUS[chip].capability
    area = lambda x: x.rows * x.keys  # noqa: E731

    def rule(**traits):
        return blocks.heuristic(kernel, capability, dataclasses.replace(CALL, **traits))

    for size, sources in itertools.product((16, 64, 128, 256), (0, 1, 2, 3, 4)):
        found = rule(size=size, sources=sources)
        assert min(found.rows, found.keys) >= 16
        assert area(rule(size=256, sources=4)) <= area(found) <= area(rule(size=16, sources=0))
        assert area(rule(size=size, sources=sources, itemsize=4, stored=4)) <= area(found)


@pytest.mark.parametrize("chip", static.CHIPS)
def test_tiles_of_a_cache_fit_the_shared_memory(chip):
    """Also of 16 queries over pages on an L40S, and of four sources with heads of 256."""
    capability = devices.GPUS[chip].capability
    for size, sources, rows in itertools.product((64, 128, 256), (1, 2, 4), (4, 32, 64)):
        call = dataclasses.replace(CALL, size=size, sources=sources, rows=rows)
        sizes = blocks.heuristic("decode", capability, call)
        tiles = sizes.stages * sizes.keys * 2 * sources * size * call.stored
        assert tiles <= devices.shared_memory(capability)
        if sources < 4 or size < 256 or rows < 64:
            assert blocks.split_bytes(sizes, call) <= devices.shared_memory(capability)


F32 = {"dtype": "float32", "storage": "float32"}


@pytest.mark.parametrize(
    ("chip", "call", "kernel", "rows"),
    [
        ("l40s", {"length": 16, "sources": 2, **F32}, "forward", 16),
        ("l40s", {"length": 16, "size": 256, "sources": 4}, "forward", 16),
        ("h100", {"length": 16, "size": 256, "sources": 2, **F32}, "forward", 16),
        ("h100", {"length": 16, "sources": 2, **F32}, "decode", 64),
        ("l40s", {"length": 1, "sources": 2, **F32}, "decode", 16),
        ("l40s", {"length": 1024, "ragged": True, "sources": 2, **F32}, "decode", 32),
        ("h100", {"length": 1024, "ragged": True, "sources": 2, **F32}, "decode", 64),
    ],
)
def test_where_the_queries_of_all_sources_do_not_fit_fewer_rows_or_the_tile_kernel_serve(
    chip, call, kernel, rows
):
    """They stay in shared memory throughout; the driver would refuse the launch at run time."""
    made = static.launches(workloads.Workload(name="", **call), chip)[0]
    assert made.name.split(".")[1] == kernel
    assert made.constants["BM"] == rows


def test_a_step_whose_smallest_block_does_not_fit_is_refused():
    call = workloads.Workload(name="", length=1024, ragged=True, size=256, sources=4, **F32)
    with pytest.raises(
        NotImplementedError, match="4 float32 query heads of size 256 .* L40S holds"
    ):
        static.launches(call, "l40s")
    assert static.launches(call, "h100")[0].constants["BM"] == 16


def test_splits_fill_the_device_without_tiny_ones():
    for programs, keys in ((8, 32768), (64, 4096), (256, 4096), (1024, 512)):
        count = split_calls.splits(H100, programs, keys, 64)
        assert programs * count >= 264
        assert count == 1 or programs * (count - 1) < 264  # not more than it takes
    assert split_calls.splits(H100, 8, 100, 64) == 1
