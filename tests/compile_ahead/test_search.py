"""The search: what it tries, when it stops, and what it calls the fastest."""

import dataclasses

import pytest

from experiments.compile_for_tpu import paper_run
from fusedkv_jax.compile_ahead import report, search, text
from fusedkv_jax.compile_ahead.chips import Slice
from fusedkv_jax.compile_ahead.roofline import Roofline
from fusedkv_jax.sharding import MeshConfig

PLACE = Slice.parse("v5e:4x4")


def made(seconds):
    estimate = Roofline(seconds, seconds / 2, 0.0, model_flops=1e12, peak_flops=197e12)
    return report.Report(
        "train", {"parameters": 2**30}, 2**30, 0, 2**31, 2**34, 1e12, 1e9,
        {"all-gather": (2, 2**30)}, {}, estimate, 4096, 1.0,
    )  # fmt: skip


@pytest.fixture
def tried(monkeypatch):
    """Candidates 0, 1, 2, ..., of which odd ones do not fit and later ones are faster."""
    tried = []

    def candidate(number):
        return search.Candidate(MeshConfig(data=1, fsdp=number + 2), "full", 1, 0.0, 0.0)

    def attempt(candidate, *_):
        number = candidate.mesh.fsdp - 2
        tried.append(number)
        fits = number % 2 == 0
        return search.Trial(candidate, made(10.0 - number) if fits else None, number)

    monkeypatch.setattr(search, "candidates", lambda *_: list(map(candidate, range(20))))
    monkeypatch.setattr(search, "attempt", attempt)
    return tried


def test_stops_after_as_many_as_are_wanted_and_puts_the_fastest_first(tried):
    trials = search.search(paper_run("332m", "mha"), PLACE, [], wanted=2)
    assert tried == [0, 1, 2]
    assert [t.candidate.mesh.fsdp - 2 for t in trials] == [2, 0, 1]
    table = text.describe_trials(trials).splitlines()
    assert "fsdp=4" in table[1] and "8,000 ms" in table[1] and "does not fit" in table[3]


def test_compiles_no_more_than_the_limit(tried):
    search.search(paper_run("332m", "mha"), PLACE, [], wanted=9, limit=4)
    assert tried == [0, 1, 2, 3]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("sizes", [{"wanted": 0}, {"wanted": -1}, {"limit": 0}, {"wanted": 1.5}])
def test_counts_that_cannot_be_are_refused_before_anything_is_compiled(tried, sizes):
    ((name, value),) = sizes.items()
    with pytest.raises(ValueError, match=f"{name}={value}; use a whole number of at least 1"):
        search.search(paper_run("332m", "mha"), PLACE, [], **sizes)
    assert tried == []


def test_expected_memory_and_time_follow_the_settings():
    config = paper_run("1_5b", "fusedkv")
    whole = {"data": 16, "fsdp": 1, "context": 1, "tensor": 1}
    split = whole | {"data": 1, "fsdp": 16}

    def expect(mesh, remat="full", parts=32, batch=512):
        data = dataclasses.replace(config.data, batch_size=batch)
        changed = dataclasses.replace(config, data=data)
        return search._expect(changed, PLACE, mesh, remat, parts)

    base = expect(whole)
    assert expect(split).memory < base.memory
    assert expect(whole, parts=1).memory > base.memory
    assert expect(whole, "none").memory > expect(whole, "qkv").memory > base.memory
    assert expect(whole, "none").seconds < base.seconds
    assert expect(whole, parts=16, batch=256).seconds == pytest.approx(base.seconds / 2, rel=0.01)
