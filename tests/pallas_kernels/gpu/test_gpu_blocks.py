"""Block sizes: what the table and the rule give, and how decoding is split."""

import pytest

from pallas_kernels.gpu import blocks, calls
from pallas_kernels.gpu.device import GpuTarget

CALL = {"itemsize": 2, "stored": 2, "size": 128, "sources": 2, "rows": 4, "simple": True}


def test_entries_are_powers_of_two_that_say_where_they_come_from():
    assert blocks.table()
    for entry in blocks.table():
        assert entry["kernel"] in blocks.KERNELS and entry["origin"] and entry["devices"]
        for name in ("rows", "keys", "warps"):
            assert entry[name] & (entry[name] - 1) == 0
        assert min(entry["rows"], entry["keys"]) >= 16


def test_the_table_is_for_its_devices_and_the_rule_for_all_others():
    on = lambda kind, **x: blocks.choose("decode", kind, **{**CALL, **x})  # noqa: E731
    rule = blocks.heuristic("decode", itemsize=2, size=128, sources=2, rows=4)
    assert on("NVIDIA A100-SXM4-40GB") == rule
    assert on("NVIDIA H100 80GB HBM3", rows=20).rows == 32
    assert on("NVIDIA H100 80GB HBM3", sources=0).stages == 3
    forward = blocks.choose("forward", "NVIDIA H100 PCIe", **CALL)
    masked = blocks.choose("forward", "NVIDIA H100 PCIe", **{**CALL, "simple": False})
    assert (forward.keys, masked.keys) == (64, 32)


@pytest.mark.parametrize("kernel", blocks.KERNELS)
def test_the_rule_takes_less_memory_for_more_sources(kernel):
    options = {"itemsize": 2, "size": 128, "rows": 64}
    one, four = (blocks.heuristic(kernel, sources=x, **options) for x in (1, 4))
    assert four.keys < one.keys or kernel.startswith("backward")


def test_splits_fill_the_device_without_tiny_ones():
    device = GpuTarget(kind="NVIDIA H100", cores=132, compute_capability=90, launch=print)
    for programs, keys in ((8, 32768), (64, 4096), (256, 4096), (1024, 512)):
        count = calls.splits(device, programs, keys, 64)
        assert programs * count >= 264
        assert count == 1 or programs * (count - 1) < 264  # not more than it takes
    assert calls.splits(device, 8, 100, 64) == 1
