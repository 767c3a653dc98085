"""The benchmark: its quick run end to end, its verdicts and its mistakes."""

import json
import time

import numpy as np
import pytest

from experiments.benchmarks import programs, report, speed, torch_llama, turns
from fusedkv_jax.config import ModelConfig
from tests.experiments import commands

TOY = ModelConfig(
    vocab_size=32,
    num_layers=2,
    d_model=16,
    num_heads=2,
    num_kv_heads=1,
    d_ff=32,
    max_length=32,
    qk_norm=False,
)


@pytest.fixture(scope="module")
def quick():
    """(printed lines, JSON document) of a quick run of what needs no real compilation."""
    names = ("training", "decoding", "latency")
    flags = ["--quick", "--rounds=1", *(f"--only={name}" for name in names)]
    (out,) = commands.run_here("benchmark", flags)
    *table, last = out.splitlines()
    return table, json.loads(last)


def test_document_names_device_versions_and_measurements(quick):
    table, document = quick
    assert (document["suite"], document["quick"], document["rounds"]) == ("cpu", True, 1)
    assert document["device"]["platform"] == "cpu" and document["device"]["cores"] >= 1
    assert document["versions"]["jax"].count(".") == 2
    assert list(document["measurements"]) == ["training", "decoding", "latency"]
    layouts = [row["layout"] for row in document["measurements"]["latency"]["rows"]]
    assert layouts == ["mha", "fusedkv_lite", "fusedkv"]
    for name in layouts:
        assert any(line.split()[:1] == [name] for line in table)


def test_targets_follow_from_the_rows(quick):
    _, document = quick
    found = document["measurements"]
    rows = {row["layout"]: row for row in found["latency"]["rows"]}
    expected = {
        f"TTFT of {name}, of mha's": rows[name]["first token s"] / rows["mha"]["first token s"]
        for name in ("fusedkv", "fusedkv_lite")
    }
    expected["TPOT of fusedkv_lite, of mha's"] = (
        rows["fusedkv_lite"]["later token s"] / rows["mha"]["later token s"]
    )
    if not torch_llama.missing():
        ours, theirs = found["training"]["rows"]
        expected["training, times transformers"] = theirs["seconds"] / ours["seconds"]
        assert ours["tokens/s"] == pytest.approx(2 * 16 / ours["seconds"])
        ours, theirs = found["decoding"]["rows"]
        expected["decoding batch 2, times transformers"] = theirs["seconds"] / ours["seconds"]
        assert ours["tokens/s"] == pytest.approx(2 * 4 / ours["seconds"])
    targets = [target for measurement in found.values() for target in measurement["targets"]]
    assert {t["name"]: t["value"] for t in targets} == pytest.approx(expected)
    assert document["targets"] == len(targets)
    assert document["targets_met"] == sum(target["met"] for target in targets)


def test_without_torch_the_comparisons_say_so(monkeypatch):
    monkeypatch.setattr(torch_llama, "missing", lambda: "torch is not installed")
    found = speed.measure_training(TOY, batch=2, length=8, rounds=1)
    assert found.text().endswith("skipped: torch is not installed")
    assert found.to_dict()["targets"] == []


@pytest.mark.skipif(bool(torch_llama.missing()), reason=torch_llama.missing() or "installed")
def test_both_train_steps_learn_the_same_batch():
    """Each contestant really updates: the loss of a repeated batch falls from log V."""
    tokens = np.random.default_rng(0).integers(0, TOY.vocab_size, (2, 9), np.int32)
    for make in (speed.train_step, torch_llama.train_step):
        step = make(TOY, tokens[:, :-1], tokens[:, 1:])
        losses = [step() for _ in range(20)]
        assert losses[0] == pytest.approx(np.log(TOY.vocab_size), abs=0.2)
        assert losses[-1] < losses[0] - 0.002


@pytest.mark.parametrize(
    ("relation", "below", "equal", "above"),
    [("<=", True, True, False), (">=", False, True, True), ("==", False, True, False)],
)
def test_verdict_of_a_target(relation, below, equal, above):
    verdicts = [report.Target("x", value, relation, 2).met for value in (1, 2, 3)]
    assert verdicts == [below, equal, above]


def test_turns_give_each_contestants_median_and_drop_the_first_round():
    naps = {"fast": iter([0.2, 0.01, 0.01, 0.15]), "slow": iter([0.0, 0.05, 0.05, 0.05])}
    contestants = {name: lambda nap=nap: time.sleep(next(nap)) for name, nap in naps.items()}
    seconds = turns.take_turns(contestants, 3)
    assert 0.01 <= seconds["fast"] < 0.045  # its first round and its one slow round do not show
    assert 0.05 <= seconds["slow"] < 0.2


def test_mixed_requests_fit_and_differ():
    prompts, params = programs.mixed_requests(TOY, 50, 20)
    sizes = {len(prompt) for prompt in prompts}
    assert len(sizes) > 10
    assert len({p.temperature for p in params}) == 3
    assert all(len(x) + p.max_tokens <= 20 for x, p in zip(prompts, params, strict=True))


def test_depth_is_measured_by_real_compilations(fresh_compilation, monkeypatch):
    monkeypatch.setattr(programs, "LAYOUTS", ("mha",))
    monkeypatch.delitem(programs.PROGRAMS, "train step")
    with programs.counted_compilations() as seconds:
        found = programs.measure_depth(TOY, depths=(2, 3), rounds=1)
    (row,) = found.rows
    assert row["size ratio"] == row["size at 3"] / row["size at 2"]
    assert row["size at 2"] > 100
    assert [target.bound for target in found.targets] == [1.2, 1.5]
    assert found.targets[1].value == row["time ratio"]
    assert row["compile s at 2"] > 0 and len(seconds) >= 2


def test_mistakes_are_one_line():
    commands.check_mistakes(
        "benchmark",
        [
            (["--suite=cpus"], "--suite=cpus is unknown; did you mean cpu?"),
            (["--only=trainings"], "--only=trainings is unknown; did you mean training?"),
            (["--rounds=0"], "--rounds"),
            (["--url=http://localhost:8000"], "--url"),
        ],
    )
