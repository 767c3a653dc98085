"""Studies: what is next, who takes it, what a record holds, and what follows from records."""

import dataclasses
import itertools
import json
import math
import pathlib
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from experiments.common import runs
from experiments.study import (
    command,
    corpus,
    plan,
    recalled,
    records,
    report,
    speed,
    statistics,
    tables,
    worker,
)
from experiments.study.claims import claim
from experiments.study.grid import Cell, Row, Seeds, Size
from fusedkv_jax import costs, layouts, presets
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.training import DivergedError
from tests.experiments import commands

WORDS = "the cache of a layer is read by upper layers which rebuild it from two lower ones".split()
RATE = 8e-3


@pytest.fixture(scope="module")
def study():
    """Toy sizes of the real grid."""
    model = ModelConfig(
        vocab_size=300,
        num_layers=4,
        d_model=16,
        num_heads=4,
        d_ff=16,
        max_length=32,
        tie_embeddings=True,
        scan_layers=False,
    )
    return dataclasses.replace(
        command.load("scaling"),
        vocab_size=300,
        seq_len=32,
        tokens_per_parameter=1,
        sizes={"toy": Size(model=model, batch_size=32, learning_rate=RATE)},
        checked=(),
        draws=(Seeds(0, 0), Seeds(1, 1)),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of text: 300 short documents, 10 held out, and another text."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def text(count):
        return " ".join(rng.choice(WORDS) for _ in range(count))

    for name, count in (("train.jsonl", 300), ("valid.jsonl", 10)):
        lines = [json.dumps({"text": text(rng.randint(20, 80))}) + "\n" for _ in range(count)]
        (folder / name).write_text("".join(lines))
    (folder / "other.valid.txt").write_text(text(100))
    return folder


@pytest.fixture(scope="module")
def done(study, data, tmp_path_factory):
    """A worker that has completed one cell, and its record."""
    folder = tmp_path_factory.mktemp("study")
    own = worker.Worker(study, corpus.Texts.find(data), folder, folder / "records")
    cell = Cell("toy", "fusedkv", Seeds(0, 1), RATE)
    record = own.run(cell, folder / "runs" / cell.name)
    records.write(own.output, record)
    return own, record


def fake(study, cell, loss):
    """A record with a loss of our choice."""
    found = {"loss": loss, "bits_per_byte": loss / 2}
    texts = {"tokenizer": "0" * 64}
    return records.make(study, cell, texts, {"heldout": found, "other": found}, 1.0)


def test_the_grid_compares_equal_caches(study):
    scaling = command.load("scaling")
    for size, chosen in scaling.sizes.items():
        models = {row: scaling.model(size, row) for row in scaling.rows}
        cache = {row: costs.cache_bytes_per_token(model) for row, model in models.items()}
        half = [row for row in scaling.rows if row not in ("mha", "resformer", "svformer", "lckv")]
        assert {cache[row] for row in half} == {cache["mha"] // 2}
        assert abs(chosen.parameters / (1e6 * float(size[:-1])) - 1) < 0.15
        assert scaling.tokens(size) == pytest.approx(20 * chosen.parameters, rel=0.01)
        recorded = size in ("0.05m", "0.1m", "0.4m")  # whose sums must keep their order
        assert chosen.logits_mib == (512 if recorded else None)
        depth = chosen.model.num_layers
        same = [layouts.resolve(spec, depth).layers for spec in (f"mlkv:m={depth // 2}", "cla:k=2")]
        assert same[0] == same[1]  # why there is no row mlkv


def test_the_search_goes_on_until_higher_losses_are_on_both_sides(study):
    best = {2 * RATE: 1.0, 4 * RATE: 0.9, 8 * RATE: 0.95, RATE: 1.1, RATE / 2: 1.2}
    losses, tried = {}, []
    while plan.tuned_rate(study, losses, "toy", "mha") is None:
        cell = next(c for c in plan.search(study, losses, "toy", "mha") if c not in losses)
        losses[cell] = best[cell.learning_rate]
        tried.append(cell.learning_rate / RATE)
    assert tried == [1, 0.5, 2, 4, 8]
    assert plan.tuned_rate(study, losses, "toy", "mha") == 4 * RATE


def test_rows_wait_for_the_rate_then_complete_one_after_the_other(study):
    study = dataclasses.replace(study, checked=("fusedkv",))
    rates = {RATE: 1.0, RATE / 2: 2.0, RATE * 2: math.inf}  # the last one diverged
    losses = {Cell("toy", "mha", Seeds(0, 0), rate): loss for rate, loss in rates.items()}
    first = list(plan.wanted(study, {}, rows=["fusedkv"]))
    assert {cell.row for cell in first} == {"mha"} and len(first) == 3
    after = [cell for cell in plan.wanted(study, losses, rows=["fusedkv"]) if cell not in losses]
    assert [(c.row, c.draw.seed, c.learning_rate / RATE) for c in after] == [
        ("fusedkv", 0, 1),
        ("fusedkv", 1, 1),
        ("fusedkv", 0, 0.5),
        ("fusedkv", 0, 2),
    ]


def test_more_draws_follow_all_rows_draw_by_draw(study):
    more = {"mha": (Seeds(7, 7), Seeds(8, 8)), "gqa": (Seeds(7, 7), Seeds(8, 8))}
    sizes = {"toy": dataclasses.replace(study.sizes["toy"], more_draws=more)}
    study = dataclasses.replace(study, sizes=sizes)
    rates = {RATE: 1.0, RATE / 2: 2.0, RATE * 2: 2.0}
    losses = {Cell("toy", "mha", Seeds(0, 0), rate): loss for rate, loss in rates.items()}
    cells = dict.fromkeys(plan.wanted(study, losses, rows=["mha", "gqa", "cla"]))
    after = [(c.row, c.draw.seed) for c in cells if c not in losses]
    assert after == [
        ("mha", 1), ("gqa", 0), ("gqa", 1), ("cla", 0), ("cla", 1),
        ("mha", 7), ("gqa", 7), ("mha", 8), ("gqa", 8),
    ]  # fmt: skip


_HOLD = """
import pathlib, signal, sys
from experiments.study.claims import claim
with claim(pathlib.Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    signal.pause()
"""


def test_a_claim_excludes_others_and_dies_with_its_process(tmp_path):
    path = tmp_path / "claims" / "cell"
    command_line = [sys.executable, "-c", _HOLD, str(path)]
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        with claim(path) as mine:
            assert not mine
        other.kill()
    with claim(path) as mine:
        assert mine


def test_a_record_says_what_was_run(done, study):
    own, record = done
    model = study.model("toy", "fusedkv")
    assert records.read_all(own.output, study) == [record]
    assert record["settings"]["train"] == {"steps": 8, "seed": 0, "grad_accumulation": 1}
    assert record["settings"]["data"]["seed"] == 1
    assert record["cache_bytes_per_token"] == costs.cache_bytes_per_token(model, "float32")
    tokens = record["train_tokens"]
    assert tokens == 8 * 32 * 32
    assert record["train_flops"] == costs.train_flops_per_token(model, 32) * tokens
    assert 1.0 < record["losses"]["heldout"]["loss"] < math.log(300)
    # Text of the same words: the vocabulary and the bytes are counted alike.
    bits = [record["losses"][text]["bits_per_byte"] for text in ("heldout", "other")]
    assert bits[0] == pytest.approx(bits[1], rel=0.2)
    assert record["corpus"]["train_tokens"] < record["corpus"]["train_bytes"]
    for private in (str(own.workdir), str(own.texts.train.parent)):
        assert private not in json.dumps(record)


def test_groups_of_targets_make_up_the_whole_loss(done):
    _, record = done
    for text, groups in record["groups"].items():
        count = sum(group["targets"] for group in groups.values())
        total = sum(group["targets"] * group["loss"] for group in groups.values())
        assert total / count == pytest.approx(record["losses"][text]["loss"], rel=1e-6)
        assert groups["repeated"]["targets"] > 10  # text of a few words


def test_records_of_other_settings_are_refused(done, study, tmp_path):
    _, record = done
    records.write(tmp_path, record)
    longer = dataclasses.replace(study, tokens_per_parameter=2)
    with pytest.raises(ValueError, match=r"another setting, train\.steps: 8 -> 15; move it away"):
        records.read_all(tmp_path, longer)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json is no record of --study=scaling"):
        records.read_all(tmp_path, study)


def test_records_stay_valid_when_configurations_get_new_fields(done, study, tmp_path):
    older = json.loads(json.dumps(done[1]))
    del older["settings"]["model"]["norm_eps"], older["settings"]["optimizer"]["offload"]
    records.write(tmp_path, older)
    assert records.read_all(tmp_path, study) == [older]


def test_check_finds_the_recorded_loss_or_says_what_differs(done, tmp_path):
    own, record = done
    name = records.cell_of(record).name
    assert worker.check(own, name) is None
    other = json.loads(json.dumps(record))
    other["losses"]["heldout"]["loss"] += 0.25
    message = worker.difference(other, record)
    assert message is not None and message.endswith("0.25 apart; the environments are equal")
    other["environment"]["jax"] = "0.0.1"
    message = worker.difference(other, record)
    assert message is not None
    assert "0.25 apart; another environment: jax: 0.0.1 -> " in message
    other["corpus"]["tokenizer"] = "0"
    records.write(tmp_path, other)
    with pytest.raises(ValueError, match="another text, tokenizer: '0' -> "):
        worker.check(dataclasses.replace(own, output=tmp_path), name)
    with pytest.raises(ValueError, match="--check=x: there is no such record"):
        worker.check(own, "x")


def test_workers_leave_finished_and_claimed_cells_alone(done, study, tmp_path, monkeypatch):
    own, _ = done
    own = dataclasses.replace(own, workdir=tmp_path, output=tmp_path / "records", rows=["mha"])
    losses = iter(range(1, 100))
    ran = []

    def run(self, cell, folder):
        ran.append(cell.name)
        folder.mkdir(parents=True, exist_ok=True)
        if len(ran) == 2:
            raise runs.Interrupted("SIGTERM")
        return fake(study, cell, float(next(losses)))

    monkeypatch.setattr(worker.Worker, "run", run)
    held = tmp_path / "claims" / "toy-mha-seed0-order0-lr0.004"
    with claim(held), pytest.raises(runs.Interrupted):
        own.work()
    assert ran == ["toy-mha-seed0-order0-lr0.008", "toy-mha-seed0-order0-lr0.016"]
    own.work()
    assert ran[2:] == [
        "toy-mha-seed0-order0-lr0.004",
        "toy-mha-seed0-order0-lr0.016",
        "toy-mha-seed1-order1-lr0.008",
    ]
    own.work()
    assert len(ran) == 5


def test_a_run_that_diverges_is_recorded(done, study, tmp_path, monkeypatch):
    own, _ = done

    def complete(config, folder):
        raise DivergedError("loss")

    monkeypatch.setattr(runs, "complete", complete)
    record = own.run(Cell("toy", "mha", Seeds(0, 0), 1e9), tmp_path)
    records.write(tmp_path, record)
    assert records.read_all(tmp_path, study) == [record]
    assert records.loss_of(record) == records.loss_of(record, "other") == math.inf


def test_intervals_are_students(study):
    values = np.random.default_rng(0).normal(size=5)
    estimate = statistics.Estimate.of(values.tolist())
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert estimate.mean - estimate.half_width == pytest.approx(low)
    assert estimate.mean + estimate.half_width == pytest.approx(high)
    assert statistics.Estimate.of([1.0]).half_width is None
    assert not statistics.Estimate.of([1.0]).excludes_zero


def made(study):
    """Records of three rows at the tuned rate, one draw missing and one diverged."""
    rates = {RATE: 2.0, RATE / 2: 2.5, RATE * 2: 2.25}
    cells = {Cell("toy", "mha", Seeds(0, 0), rate): loss for rate, loss in rates.items()}
    cells[Cell("toy", "mha", Seeds(1, 1), RATE)] = 3.0
    cells |= {Cell("toy", "fusedkv", Seeds(s, s), RATE): 1.5 + 1.25 * s for s in (0, 1)}
    cells[Cell("toy", "gqa", Seeds(1, 1), RATE)] = 3.25
    cells[Cell("toy", "yoco", Seeds(0, 0), RATE)] = math.inf
    return [fake(study, cell, loss) for cell, loss in cells.items()]


def test_differences_are_paired(study):
    found = {line.row: line for line in statistics.lines(study, made(study))}
    assert list(found) == ["mha", "fusedkv", "gqa"]  # yoco has no finite loss
    fused = found["fusedkv"]
    assert (fused.loss.mean, fused.loss.count) == (2.125, 2)
    assert fused.against["mha"].mean == -0.375  # -0.5 and -0.25
    low, high = stats.ttest_rel([1.5, 2.75], [2.0, 3.0]).confidence_interval(0.95)
    assert fused.against["mha"].half_width == pytest.approx((high - low) / 2)
    assert fused.against["gqa"] == statistics.Estimate(-0.5, 1, None)  # their one common draw
    assert found["gqa"].against["mha"].mean == 0.25


def test_the_report_says_which_targets_a_difference_comes_from(study):
    def groups(*losses):
        sizes = zip((20, 30, 50), losses, strict=True)
        found = [{"targets": count, "loss": loss} for count, loss in sizes]
        return {"groups": {"heldout": dict(zip(recalled.GROUPS, found, strict=True))}}

    found = made(study)
    assert "in groups" not in report.markdown(study, found)
    for record in found:
        row, seed = record["cell"]["row"], record["cell"]["draw"]["seed"]
        if row == "mha":
            record |= groups(4.0 + seed, 2.0, 3.0)
        elif row == "fusedkv":
            record |= groups(3.0 + seed, 2.5, 2.9)
    text = report.markdown(study, found)
    assert "recalled 20.0% (4.5000 ± " in text
    (line,) = [line for line in text.splitlines() if line.startswith("| fusedkv | 2 | **-1.0000")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[3:5] == ["**+0.5000 ± 0.0000**", "**-0.1000 ± 0.0000**"]
    assert cells[5:] == ["-0.2000", "+0.1500", "-0.0500"]


def test_the_report_comes_from_records_alone(study, tmp_path):
    for record in made(study):
        records.write(tmp_path / "records", record)
    text = report.write(study, tmp_path / "records", tmp_path)
    assert (tmp_path / "table.md").read_text() == text
    (line,) = [line for line in text.splitlines() if line.startswith("| fusedkv ")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:2] == ["fusedkv", "2"] and cells[7] == "-0.5000"
    assert cells[6].startswith("-0.3750 ± 1.58")  # t = 12.7 for two draws: not bold
    assert "| mha | 2.5000 | 2.0000 | 2.2500 |" in text and "0.008 is used" in text
    assert "| yoco |" not in text.split("Loss by learning rate")[0]
    assert "All runs diverged, so that there is no loss: yoco (1).\n" in text
    times = [line.split("|")[1:-1] for line in (tmp_path / "speed.md").read_text().splitlines()]
    (fused,) = ([cell.strip() for cell in row] for row in times if row and row[0] == " fusedkv ")
    assert fused[1] == "0.5" and fused[2].startswith("2.1250 ± ")
    assert fused[3].endswith("(0.50)") and fused[4].endswith("(1.46)")
    cpu = speed.measured()
    assert fused[6] == f"{cpu['fusedkv'].later / cpu['mha'].later:.2f}" != "1.00"
    for name in ("losses.png", "differences.png", "speed.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(tmp_path / "records")
    with pytest.raises(ValueError, match="holds no records of --study=scaling; run the study"):
        report.write(study, tmp_path / "records", tmp_path)


def test_times_are_arithmetic():
    """A step that waits for memory: parameters and what each layer of each row reads."""
    found = speed.estimates({name: Row(layout=name) for name in ("mha", "fusedkv", "lckv")})
    stream = 32_768 * 2048 * 2  # bytes of one layer's keys in 1.5B
    parameters = 2 * costs.parameter_count(presets.get("1_5b", layout="mha"))
    assert found["mha"].later == pytest.approx((parameters + 8 * 48 * stream) / 2765e9)
    more = found["fusedkv"].later - found["mha"].later  # 12 layers read two of each
    saved = 12 * 2 * 2 * 2048**2 - 12 * 3 * 2 * 2048 // 2 * 2
    assert more == pytest.approx((8 * 24 * stream - saved) / 2765e9, rel=1e-3)
    assert found["fusedkv"].of(found["mha"]).first == pytest.approx(0.5, abs=0.01)
    assert found["lckv"].first > 7 * found["mha"].first  # prompts take all passes


def test_times_stand_beside_the_losses_of_the_size_with_most_rows(study):
    lines = statistics.lines(study, list(made(study)))
    study = dataclasses.replace(study, sizes={**study.sizes, "larger": study.sizes["toy"]})
    larger = [dataclasses.replace(line, size="larger") for line in lines]
    for found, expected in ((lines + larger, larger), (lines + larger[:1], lines)):
        assert [line.size for line in speed.chosen(study, found)] == [x.size for x in expected]
    assert not speed.chosen(study, [line for line in lines if line.row != study.reference])


def test_rows_change_heads_only_as_they_can(study):
    model = study.sizes["toy"].model
    wide = Row(layout="mha", queries_per_kv_head=2, head_widening=2).apply(model)
    assert (wide.num_heads, wide.kv_heads, wide.channels) == (2, 1, 8)
    with pytest.raises(ValueError, match="model.num_heads=4 must be a multiple of 3"):
        Row(layout="mha", head_widening=3).apply(model)


def test_texts_are_found_or_named(data, tmp_path):
    assert corpus.Texts.find(data).others == {"other": data / "other.valid.txt"}
    (tmp_path / "train.txt").write_text("a")
    with pytest.raises(ValueError, match=r"must hold one file valid\.\*; there is none"):
        corpus.Texts.find(tmp_path)
    (tmp_path / "valid.txt").write_text("b")
    (tmp_path / "valid.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"there is valid\.jsonl, valid\.txt"):
        corpus.Texts.find(tmp_path)


def test_other_text_is_refused(done, study, data, tmp_path):
    own, _ = done
    for path in data.iterdir():
        shutil.copy(path, tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ValueError, match="was made from other texts; remove it"):
        corpus.tokenize(corpus.Texts.find(tmp_path), 300, own.workdir / "corpus")


def test_mistakes(tmp_path):
    study, folder = "--study=scaling", pathlib.Path(tmp_path)
    commands.check_mistakes(
        "reproduce",
        [
            (["--study=scalin"], "--study=scalin is unknown; did you mean scaling"),
            ([study], "--data is missing"),
            ([study, f"--data={folder}"], "must hold one file train.*; there is none"),
            ([study, "--seeds=1"], "--seeds has no effect with --study"),
            ([study, "--config.train.steps=1"], "--config.FIELD has no effect with --study"),
            ([study, "--report", f"--output={folder}"], "holds no records of --study=scaling"),
            (["--sizes=0.1m"], "--sizes has no effect without --study; add --study"),
        ],
    )


def test_tables_show_intervals_and_what_excludes_zero():
    certain, open_, single = itertools.starmap(
        statistics.Estimate, [(0.5, 3, 0.25), (-0.5, 3, 0.75), (2.0, 1, None)]
    )
    assert tables.mean(certain, 2) == "0.50 ± 0.25" and tables.mean(single) == "2.0000"
    shown = [tables.difference(each, 1) for each in (certain, open_, single, None)]
    assert shown == ["**+0.5 ± 0.2**", "-0.5 ± 0.8", "+2.0", ""]
    assert tables.markdown(["a", "b", "c"], [["1", "2"]], words=(0, 2)) == [
        "| a | b | c |",
        "| --- | ---: | --- |",
        "| 1 | 2 |  |",
    ]
