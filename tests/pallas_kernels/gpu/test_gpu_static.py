"""Every committed block size compiles for an H100 without spills and within its memory."""

import pytest

from pallas_kernels.gpu import blocks, static
from tests.pallas_kernels.gpu.toolchain import needs_toolchain

pytestmark = needs_toolchain
SIZES = ("rows", "keys", "warps", "stages")
# Compiled at once, in every run: the kernels of fused layers with heads of 64.
QUICK = {("decode", 2, 64, 2, 16), ("forward", 2, 64, 2, 128)}


def identity(entry):
    return tuple(entry[x] for x in ("kernel", "stored", "size", "sources", "rows"))


def cases():
    for entry in blocks.table():
        marks = () if identity(entry) in QUICK else (pytest.mark.slow,)
        simple = ("simple",) if entry.get("simple") else ()
        yield pytest.param(entry, marks=marks, id="-".join(map(str, (*identity(entry), *simple))))


@pytest.mark.parametrize("entry", list(cases()))
def test_no_spills_and_within_shared_memory(entry):
    for call in static.entry_calls(entry):
        (launch,) = [x for x in static.launches(call) if x.name.split(".")[1] == entry["kernel"]]
        line = static.line(launch)
        assert [line[x] for x in SIZES] == [entry[x] for x in SIZES], "another entry is chosen"
        assert line["spill"] == 0, line
        assert line["shared"] <= static.SHARED_LIMIT, line
        if entry["kernel"] != "decode":
            assert line["wgmma"] > 0, line


def test_the_report_names_every_kernel_of_a_call():
    lines = static.report((static.Workload(name="small", length=1, keys=256, size=16),))
    assert [(x["call"], x["kernel"]) for x in lines] == [("small", "decode"), ("small", "combine")]
    assert all(x["registers"] > 0 and x["shared"] > 0 and x["spill"] == 0 for x in lines)
