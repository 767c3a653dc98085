"""The search over layouts: what it costs them, who goes on, what is on the front, the report."""

import dataclasses
import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.study import records
from experiments.study.recall import worker
from experiments.study.retrieval import (
    candidates,
    confirmation,
    confirmation_report,
    losses,
    report,
    results,
    search,
)
from experiments.study.retrieval.candidates import BUDGET, CANDIDATES, REFERENCES, ROWS
from experiments.study.retrieval.results import Result
from fusedkv_jax import layouts
from fusedkv_jax.data import recall_tasks
from tests.experiments import commands

FINALISTS = ("window_keys2", "values0_keys023")


@pytest.mark.parametrize(
    ("name", "streams"),  # of one layer's keys or values, of eight
    [
        ("fusedkv", 4),
        ("gqa", 4),
        ("values0_keys01", 3),
        ("mha_values0", 6),
        ("window_keys23", 4 + 2 * 16 / 128),
        ("windows_below", 4 + 4 * 8 / 128),
        ("window_keys2", 3 + 2 * 16 / 128),
    ],
)
def test_cache_is_counted_by_stream(name, streams):
    assert candidates.cache_share(ROWS[name]) == streams / 8


def test_candidates_are_within_the_budget_and_differ():
    assert all(candidates.cache_share(row) <= BUDGET for row in CANDIDATES.values())
    models = {repr(losses.study().model(losses.SIZE, name).kv_layout) for name in CANDIDATES}
    assert len(models) == len(CANDIDATES)


def accuracy(run):
    """Of a run that the search may ask for; the finalists are the best, the longer the better."""
    name = next(name for name in ROWS if search.cell(name, run.steps, run.seed) == run)
    return 0.1 * (name in FINALISTS) + 0.01 * list(ROWS).index(name) / len(ROWS) + run.steps / 1e4


def test_the_best_go_on_when_all_have_run():
    done = {}
    for rung in search.RUNGS:
        wanted = list(search.cells(done))
        missing = [run for run in wanted if run not in done]
        assert {(run.steps, run.seed) for run in missing} == {(rung.steps, s) for s in rung.seeds}
        done |= {run: accuracy(run) for run in missing[:-1]}
        assert [run for run in search.cells(done) if run not in done] == missing[-1:]
        done[missing[-1]] = accuracy(missing[-1])
    assert all(run in done for run in search.cells(done))
    assert set(search.entrants(1, done) or ()) > {*FINALISTS, *search.ALWAYS}
    best = sorted(FINALISTS, key=lambda name: -list(ROWS).index(name))
    assert search.entrants(2, done) == [*best, *search.ALWAYS]
    assert search.entrants(0, {}) is not None and search.entrants(1, {}) is None


def test_losses_begin_with_those_that_went_furthest():
    runs = {}
    while missing := [run for run in search.cells(runs) if run not in runs]:
        runs |= {run: accuracy(run) for run in missing}
    wanted = list(dict.fromkeys(losses.cells(runs)))
    final = search.entrants(2, runs) or []
    expected = [losses.cell(name, seed) for seed in losses.SEEDS for name in final]
    assert wanted[: len(expected)] == expected
    assert {cell.row for cell in wanted} == set(ROWS)
    first = list(losses.cells({}))
    assert {cell.draw.seed for cell in first} == {0} and len(first) == len(ROWS)


def test_equal_rows_of_the_other_study_count(tmp_path):
    """Its mha is this one's; its mqa and sizes are not."""
    base = losses.scaling.get_study()
    for size, row in (("0.05m", "mha"), ("0.05m", "mqa"), ("0.1m", "mha")):
        cell = dataclasses.replace(losses.cell(row, 0), size=size)
        records.write(tmp_path / "scaling", loss_record(base, cell, 5.0))
    records.write(tmp_path / "own", loss_record(losses.study(), losses.cell("yoco", 1), 4.0))
    found = losses.read(tmp_path / "own", tmp_path / "scaling")
    assert found == {losses.cell("mha", 0): 5.0, losses.cell("yoco", 1): 4.0}


def loss_record(study, cell, loss):
    values = {"heldout": {"loss": loss, "bits_per_byte": loss / 2}}
    return records.make(study, cell, {"tokenizer": "abc"}, values, 1.0)


def test_the_front_is_what_none_beats():
    rng = np.random.default_rng(0)
    points = rng.integers(0, 6, (20, 2)).tolist()
    found = [
        Result(str(i), [0.5, 0.9][i % 5 == 0], float(a), {}, {0: float(loss), 1: -i})
        for i, (a, loss) in enumerate(points)
    ]
    inside = [(i, a, loss) for i, (a, loss) in enumerate(points) if i % 5]
    expected = [
        str(i)
        for i, a, loss in inside
        if all(b < a or other > loss for j, b, other in inside if j != i)
    ]
    assert results.front(found) == expected != []
    found.append(Result("unplaced", 0.5, 100.0, {0: 100.0}, {1: 0.0}))
    assert results.front(found) == expected


def test_the_report_pairs_fresh_seeds(tmp_path):
    found = [
        Result("mha", 1.0, 0.2, {0: 0.2, 1: 0.1, 2: 0.3, 3: 0.2}, {0: 5.0, 1: 5.5}),
        Result("fusedkv", 0.5, 0.3, {0: 0.9, 1: 0.4, 2: 0.5, 3: 0.6}, {0: 5.25, 1: 5.75}),
        Result("yoco", 0.5, 0.1, {}, {0: 5.0}),
    ]
    text = report.write(found, tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    fused, yoco, mha = (cells for cells in rows if cells and cells[0].startswith("`"))
    assert [fused[0], yoco[0], mha[0]] == ["`fusedkv`", "`yoco`", "`mha`"]  # mha is too large
    assert fused[4:6] == ["0.600 (4)", "0.500 (3)"] and fused[7] == ""
    assert fused[6] == "**+0.300 ± 0.248**"  # of 0.3, 0.2 and 0.4
    assert fused[8:10] == ["5.500 (2)", "+0.2500 ± 0.0000"] or fused[9] == "**+0.2500 ± 0.0000**"
    assert (fused[-1], yoco[4], yoco[-1], mha[-1]) == ("yes", "", "yes", "")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_names_of_points_cover_nothing():
    """Points so near to each other and to the border that names beside them would not do."""
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    places = {f"point {i}": (x, y) for i, (x, y) in enumerate([(0, 0), (0.02, 0.03), (1, 1)])}
    axes.plot(*zip(*places.values(), strict=True), "o")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in report.name_points(axes, places)]
    assert len(boxes) == len(axes.texts) == 3
    for box, (name, place) in zip(boxes, places.items(), strict=True):
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1, name
        assert not box.count_overlaps([other for other in boxes if other is not box]), name
        x, y = axes.transData.transform(place)
        assert min(abs(x - box.x0), abs(x - box.x1)) < 10 and abs(y - box.y0) < 30, name


def test_forms_are_one_with_four_layers():
    assert {form(4) for form in confirmation.FORMS.values()} == {"0_0_k2v0_k3v0"}
    chosen = layouts.resolve(confirmation.svformer_half(8), 8)
    assert chosen.layers == layouts.get("svformer_half", 8).layers
    shares = {name: confirmation.cache_share(name) for name in confirmation.FORMS}
    assert shares == {"svformer_half": 8 / 16, "half_readers": 6 / 16}


def test_the_better_form_goes_on():
    first = list(confirmation.cells({}))
    assert [run.seed for run in first] == [confirmation.CHOICE] * 2
    done = dict(zip(first, (0.5, 0.6), strict=True))
    assert confirmation.chosen(dict([*done.items()][:1])) is None
    assert confirmation.chosen(done) == "half_readers"
    later = list(confirmation.cells(done))[2:]
    first, *_, last = confirmation.TRIALS
    compared = ["half_readers", "fusedkv"]
    assert later[:2] == [confirmation.cell(name, first.seeds[0], first.size) for name in compared]
    assert later[-1] == confirmation.cell("svformer_half", 6, confirmation.WIDER)
    assert len(set(later)) == len(later) == 6 * 3 + 6 * 3 + 3 * len(last.seeds)


def test_the_next_sizes_are_reported_by_fresh_seeds(tmp_path):
    deeper = {
        "mha": {confirmation.CHOICE: record(0.9), 4: record(0.1), 5: record(0.3)},
        "fusedkv": {},
        "half_readers": {4: record(0.4), 5: record(0.5), 6: record(0.6)},
    }
    wider = {"mha": {4: record(0.8)}, "fusedkv": {confirmation.CHOICE: record(0.7)}}
    first, second, _ = confirmation.TRIALS
    found = {first: deeper, second: wider | {"half_readers": {}}}
    text = confirmation_report.write(found, tmp_path)
    assert f"## {first}" in text and "## 8 layers of width 96 with 4 heads, seeds 4, 5, 6" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    half, mha, wide_mha, fused = (cells for cells in rows if cells and cells[0].startswith("`"))
    assert half[2:] == ["0.375", "", "4, 5, 6", "0.500", "0.400 to 0.600", half[-2], ""]
    assert half[-2].startswith("+0.250 ± ")  # of 0.3 and 0.2
    assert mha[3:7] == ["0.900", "4, 5", "0.200", "0.100 to 0.300"]
    assert wide_mha[3:6] == ["", "4", "0.800"]
    assert fused == ["`fusedkv`", "`fusedkv`", "0.5", "0.700", *[""] * 5]
    assert (tmp_path / "confirmation.png").read_bytes().startswith(b"\x89PNG")


def record(accuracy):
    looks = [{"step": step, "accuracy": {"a": accuracy * step}} for step in (1, 2)]
    return {"final": {"a": accuracy - 0.1, "b": accuracy + 0.1}, "curve": looks}


def test_a_worker_searches_and_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="needs the extra reference")
    few = {name: ROWS[name] for name in (*search.ALWAYS, "yoco", "window_keys2")}
    for module in (search, results, losses):
        monkeypatch.setattr(module, "ROWS", few)
    monkeypatch.setattr(search, "REFERENCES", {})
    monkeypatch.setattr(search, "CANDIDATES", few)
    monkeypatch.setattr(
        search,
        "RUNGS",
        tuple(
            search.Rung(steps, (seed,), entrants)
            for steps, seed, entrants in ((1, 0, None), (2, 0, 1), (2, 1, 1))
        ),
    )
    small = confirmation.Size(8, 8, 2)
    monkeypatch.setattr(confirmation.cell, "__defaults__", (small,))
    trials = (
        confirmation.Trial(small, (1,), ("mha", "svformer", "gqa")),
        confirmation.Trial(confirmation.Size(8, 16, 2), (1,), ("svformer",)),
    )
    for module in (confirmation, confirmation_report):
        monkeypatch.setattr(module, "TRIALS", trials)
    monkeypatch.setattr(confirmation, "STEPS", 1)
    monkeypatch.setattr(results, "_COMMITTED", tmp_path / "none")
    monkeypatch.setattr(worker, "EXAMPLES", {"curve": 1, "final": 1})
    line = ["--study=retrieval", f"--workdir={tmp_path}/work", f"--output={tmp_path}/out"]
    (out,) = commands.run_here("reproduce", line)
    result = json.loads(out.splitlines()[-1])
    assert result.pop("form") in confirmation.FORMS
    assert result == {"study": "retrieval", "front": []}
    files = sorted((tmp_path / "out" / "records" / "recall").glob("*.json"))
    made = [json.loads(file.read_text()) for file in files]
    assert len(made) == 6 + 5 + 5 + 2 + 6 + 3
    assert all(set(record["final"]) == set(recall_tasks.names()) for record in made)
    before = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()  # as if its worker had died
    (again,) = commands.run_here("reproduce", line)
    assert again.count(": accuracy") == 1 and again.endswith(out[out.index("# Study") :])
    assert [file.stat().st_mtime_ns for file in files][1:] == before[1:]
    assert "`window_keys2`" in (tmp_path / "out" / "table.md").read_text()
    (checked,) = commands.run_here("reproduce", [*line, f"--check={files[0].stem}"])
    assert "to the last digit" in checked


def test_mistakes(tmp_path):
    for line, message in (
        (["--questions=rate"], "--questions has no effect with --study=retrieval"),
        (["--report", "--output=/nonexistent"], "holds no records of --study=retrieval"),
        (["--check=mha", f"--output={tmp_path}"], "there is no such record"),
    ):
        with pytest.raises(commands.Refused, match=message):
            commands.run_here("reproduce", ["--study=retrieval", *line])


def test_references_are_no_candidates():
    assert not REFERENCES.keys() & CANDIDATES.keys()
