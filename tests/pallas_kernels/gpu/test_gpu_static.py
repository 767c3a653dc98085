"""Block sizes compile without spills and within a chip's memory: committed ones and the rule's."""

import pytest

from pallas_kernels import devices
from pallas_kernels.gpu import blocks, static, workloads
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
    for call in workloads.entry_calls(entry):
        (launch,) = [x for x in static.launches(call) if x.name.split(".")[1] == entry["kernel"]]
        line = static.line(launch)
        assert [line[x] for x in SIZES] == [entry[x] for x in SIZES], "another entry is chosen"
        assert line["spill"] == 0, line
        assert line["shared"] <= devices.shared_memory(90), line
        assert not line["serialized"], line
        if entry["kernel"] != "decode":
            assert line["wgmma"] > 0, line


# Of the rule, by whom they are compiled for; what a100 spills, l40s does, too.
RULED = {
    "training, packed H=128": (("a100", "b200"), ("forward", "backward_keys", "backward_queries")),
    "training, 4 sources H=64": (("a100", "b200"), ("backward_queries",)),
    "training, 4 sources H=128": (("a100", "h100"), ("forward", "backward_queries")),
    "training, 4 sources H=256": (("a100", "h100", "b200"), ("forward", "backward_queries")),
    "training, fused, fp32 H=128": (("a100", "h100", "b200"), ("forward", "backward_queries")),
    "decode, 64 rows, int8 H=128": (("a100", "b200"), ("decode",)),
    "step, fused H=128": (("a100", "b200"), ("decode",)),
}
# Compiled in every run; the second spilled 9,840 bytes where Triton mixed in the product's layout.
ALWAYS = {
    ("decode, 64 rows, int8 H=128", "decode"),
    ("training, 4 sources H=256", "backward_queries"),
}


@pytest.mark.parametrize(
    ("chip", "name", "kernel"),
    [
        pytest.param(
            chip, name, kernel,
            marks=() if chip == "a100" and (name, kernel) in ALWAYS else pytest.mark.slow,
        )
        for name, (chips, kernels) in RULED.items()
        for chip in chips
        for kernel in kernels
    ],
)  # fmt: skip
def test_the_rule_spills_little_where_there_is_no_table(chip, name, kernel):
    (call,) = [x for x in workloads.CALLS if x.name == name]
    (launch,) = [x for x in static.launches(call, chip) if x.name.split(".")[1] == kernel]
    line = static.line(launch, chip)
    assert line["spill"] <= static.SPILL, line
    assert line["shared"] <= devices.shared_memory(89), line  # the least of all chips


@pytest.mark.parametrize(
    ("chip", "call"),
    [
        ("l40s", {"length": 1, "size": 128, "sources": 2, "dtype": "float32"}),
        pytest.param("h100", {"length": 16, "size": 128, "sources": 2, "dtype": "float32"},
                     marks=pytest.mark.slow),
        pytest.param("h100", {"length": 8, "size": 256, "sources": 4}, marks=pytest.mark.slow),
        pytest.param("l40s", {"length": 8, "size": 128, "sources": 4}, marks=pytest.mark.slow),
        pytest.param("a100", {"length": 16, "size": 256, "sources": 2}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_split_kernel_takes_no_more_memory_than_is_reckoned(chip, call):
    """What `auto` falls back by where a chip has less: Triton's own count is the reference."""
    dtype = call.get("dtype", "bfloat16")
    made = static.launches(workloads.Workload(name="", storage=dtype, **call), chip)[0]
    assert made.name == "decode.decode"
    sizes = blocks.BlockSizes(
        rows=made.constants["BM"], keys=made.constants["BN"], warps=made.warps, stages=made.stages
    )
    itemsize = 4 if dtype == "float32" else 2
    traits = blocks.Traits(
        itemsize=itemsize, stored=itemsize, size=call["size"], sources=call["sources"],
        rows=4 * call["length"], simple=True,
    )  # fmt: skip
    found = static.line(made, chip)["shared"]
    assert (
        found
        <= blocks.split_bytes(sizes, traits)
        <= devices.shared_memory(devices.GPUS[chip].capability)
    )


def test_the_report_names_every_kernel_of_a_call():
    lines = static.report("h100", (workloads.Workload(name="small", length=1, keys=256, size=16),))
    assert [(x["call"], x["kernel"]) for x in lines] == [("small", "decode"), ("small", "combine")]
    assert all(x["registers"] > 0 and x["shared"] > 0 and x["spill"] == 0 for x in lines)
