"""Traces and the virtual clock."""

import lzma
from pathlib import Path

import numpy as np
import pytest

from fusedkv_jax import presets
from fusedkv_jax.costs import StepCosts
from fusedkv_jax.serving import POLICIES, PagedMemory, Request, Scheduler, ToolCall
from fusedkv_jax.serving.simulate import device, read_trace, requests, simulate, summarize

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:50.9951690,396,109\n"
    "2023-11-16 18:15:46.6805900,374,44\n"
    "2023-11-16 18:15:52.0000000,10,0\n"
)
MOONCAKE = (
    '{"timestamp": 1000, "input_length": 600, "output_length": 5, "hash_ids": [4, 9]}\n'
    '{"timestamp": 3500, "input_length": 1100, "output_length": 7, "hash_ids": [4, 5, 6]}\n'
)


def _serve(number, policy="fcfs", pages=1000, **settings):
    memory = PagedMemory(pages, 16, reserve=0.0)
    scheduler = Scheduler(memory, POLICIES[policy](), **settings)
    return simulate(number, scheduler, lambda plan: 0.5), scheduler


def test_azure_traces(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    first, second = read_trace(path)  # the one without output is left out
    assert (first.seconds, first.input_length, first.output_length) == (0.0, 374, 44)
    assert second.seconds == pytest.approx(4.314579)
    one, two = requests([first, second])
    assert len(one.prompt) == 374 and one.max_tokens == 44
    assert not set(one.prompt.tolist()) & set(two.prompt.tolist()), "no common prefix"


def test_mooncake_traces(tmp_path):
    path = tmp_path / "trace.jsonl.xz"
    with lzma.open(path, "wt") as stream:
        stream.write(MOONCAKE)
    one, two = requests(read_trace(path), rate=4.0)
    assert (one.arrival, two.arrival) == (0.0, 0.5), "the last of N arrives at N / rate"
    assert (one.prompt[:512] == two.prompt[:512]).all() and one.prompt[512] != two.prompt[512]
    assert [request.arrival for request in requests(read_trace(path), rate=np.inf)] == [0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a trace"),
        ("a,b\n1,2\n", "not a trace"),
        (AZURE + "yesterday,1,2\n", "line 5"),
        (AZURE + "2023-11-16 18:15:50,1\n", "line 5"),
        (MOONCAKE + '{"timestamp": 1}\n', "line 3"),
        (MOONCAKE.replace("9", "9999999999"), "line 1: hash_ids hold 9999999999"),
        (MOONCAKE + '{"timestamp": 1, "input_length": 9000, "output_length": 1, "hash_ids": [1]}',
         "1 hash_ids for 9000"),
        (MOONCAKE + "[" * 100_000, "line 3"),
        (AZURE.splitlines()[0], "no requests"),
    ],
)  # fmt: skip
def test_broken_traces_are_one_line(tmp_path, text, message):
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(path)


def test_times_are_those_of_the_steps():
    early = Request("a", np.arange(40), max_tokens=3)
    late = Request("b", np.arange(50, 90), max_tokens=1, arrival=10.0)
    records, _ = _serve([early, late], max_num_batched_tokens=32, max_num_seqs=4)
    assert [record.ttft for record in records] == [1.0, 1.0]  # two chunks of 0.5 s
    assert records[0].latency == 2.0 and records[0].tpot == 0.5 and records[1].tpot is None
    summary = summarize(records, ttft_slo=1.0, tpot_slo=0.4)
    assert (summary.attained, summary.seconds) == (0.5, 11.0)
    assert summary.goodput == pytest.approx(1 / 11)


def test_tools_pause_a_request():
    call = ToolCall(after=2, seconds=7.0, answer=(9,) * 20)
    request = Request("a", np.arange(40), max_tokens=4, tool_calls=(call,))
    records, scheduler = _serve([request])
    assert records[0].latency == 0.5 + 0.5 + 7.0 + 0.5 + 0.5
    assert request.length == 40 + 4 + 20 and not scheduler.unfinished


@pytest.mark.parametrize("after", [4, 9])
def test_a_tool_call_that_would_never_be_made_is_refused(after):
    with pytest.raises(ValueError, match=f"after {after} tokens would never be made, as max_to"):
        Request("a", np.arange(40), 4, tool_calls=(ToolCall(after, 1.0),))


def test_the_same_seed_gives_the_same_figures():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 200, (50, 2))
    runs = [
        _serve(
            [
                Request(str(i), np.full(a, i), int(b), arrival=i / 9)
                for i, (a, b) in enumerate(lengths)
            ],
            policy,
            pages=40,
        )[0]
        for policy in ("fcfs", "fcfs", "mlfq")
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("policy", ["fcfs", "lpm", "dfs_weight", "batch_llm"])
def test_ten_shared_prefixes_are_found_by_nearly_all_who_share_them(policy):
    rng = np.random.default_rng(0)
    prefixes = rng.integers(0, 999, (10, 512), np.int32)
    times = np.cumsum(rng.exponential(1.0, 300))
    asked = [
        Request(
            str(i), np.append(prefixes[rng.integers(10)], rng.integers(0, 999, 40, np.int32)), 8, t
        )
        for i, t in enumerate(times.tolist())
    ]
    # Prefixes take 320 pages, each request 3 of its own: what nobody shares must go first.
    records, _ = _serve(asked, policy, pages=400, max_num_seqs=16)
    cached = sum(record.cached for record in records)
    assert cached >= 0.95 * 512 * (300 - 10)


def test_half_the_cache_holds_twice_the_pages():
    pages, seconds = {}, {}
    for layout in ("mha", "fusedkv"):
        costs = StepCosts.of(presets.get("1_5b", layout=layout))
        chip = device("v5e")
        pages[layout] = chip.num_pages(costs, 16)
        memory = PagedMemory(pages[layout], 16)
        scheduler = Scheduler(memory, POLICIES["fcfs"](), max_num_batched_tokens=8192)
        scheduler.add(Request("a", np.arange(8192), 2), 0.0)
        seconds[layout] = chip.step_seconds(costs, scheduler.schedule(0.0), 16)
    assert pages["fusedkv"] >= 1.95 * pages["mha"]
    assert seconds["fusedkv"] == pytest.approx(seconds["mha"] / 2, rel=0.1)


def test_devices():
    assert device("v5e:2x2").flops == 4 * device("v5e").flops
    with pytest.raises(ValueError, match="or a GPU: a100, l40s, h100, h200, b200"):
        device("v5e:3x3")
    with pytest.raises(ValueError, match="a fraction of 0.1 is used; the parameters need"):
        device("v5e").num_pages(StepCosts.of(presets.get("4b", layout="mha")), 16, utilization=0.1)


@pytest.mark.parametrize("name", ["azure_conv_2023.csv.xz", "mooncake_conversation.jsonl.xz"])
def test_recorded_traces(name):
    path = Path(__file__).parents[2] / ".." / "shared" / "traces" / name
    if not path.exists():
        pytest.skip("needs the recorded traces beside the project, in ../shared/traces")
    arrivals = read_trace(path)
    assert len(arrivals) > 12_000
    mean = np.mean([arrival.input_length for arrival in arrivals])
    assert mean == pytest.approx({"a": 1155, "m": 12035}[name[0]], rel=0.01)
