"""The paper's figures: what is measured inside a model, who trains what, the report."""

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.study import records, scaling
from experiments.study.grid import Cell, Seeds, Size
from experiments.study.paper import grids, probes, report
from experiments.study.paper.shares import shares_of
from fusedkv_jax.training.loss import batch_loss
from tests.experiments import commands
from tests.model import small


def heldout(vocab_size, rows=8, length=12):
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, vocab_size, (rows, length + 1), np.int32)
    ones = np.ones((rows, length), np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": ones,
        "segment_ids": ones,
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }


def test_norms_are_those_of_each_layers_gradient():
    """Against the plain gradient, whose arrays hold the layers of a run one after the other."""
    model = small.decoder(small.config("fusedkv"))
    batch, depth = heldout(model.config.vocab_size), model.config.num_layers
    graph, params = nnx.split(model, nnx.Param)
    count = batch["loss_mask"].sum()
    arrays = {name: jnp.asarray(array) for name, array in batch.items()}
    gradient = jax.grad(lambda p: batch_loss(graph, p, arrays)[0] / count)(params)
    found = probes.norms(model, batch)
    lower = gradient["runs"][0][0]["attention"]
    for kind, name in (("key", "k_proj"), ("value", "v_proj")):
        expected = [np.linalg.norm(layer) for layer in lower[name][...]]
        np.testing.assert_allclose(found[kind][: depth // 2], expected, rtol=1e-4)
        assert found[kind][depth // 2 :] == [None] * (depth // 2)
    whole = [np.square(leaf).sum() for leaf in jax.tree.leaves(gradient["runs"])]
    assert np.square(found["all"]).sum() == pytest.approx(sum(whole), rel=1e-4)
    assert len(found["all"]) == depth


def test_streams_are_what_the_cache_holds():
    """Keys have the size that their norm gives them, and values grow with their projection."""
    model = small.decoder(small.config("dense_fusion"))
    batch = heldout(model.config.vocab_size)
    before = probes.streams(model, batch)
    values = model.runs[0][0].attention.v_proj
    values[...] = values[...].at[1].multiply(3.0)
    after = probes.streams(model, batch)
    lower = [str(i) for i in range(model.config.num_layers // 2)]
    assert list(before["key"]) == list(before["value"]) == lower
    assert after["value"]["1"] == pytest.approx(3 * before["value"]["1"], rel=1e-4)
    assert after["value"]["0"] == before["value"]["0"] and after["key"] == before["key"]


def test_weights_name_their_sources():
    model = small.decoder(small.config("fusedkv"))
    found = probes.weights(model)
    upper = range(model.config.num_layers // 2, model.config.num_layers)
    assert [(w["kind"], w["layer"]) for w in found] == list(model.mixing())
    for weights, array in zip(found, model.mixing().values(), strict=True):
        assert weights["sources"] == [0, upper[0] - 1] and weights["layer"] in upper
        direct = np.asarray(array).reshape(2, -1)
        np.testing.assert_allclose(weights["mean"], direct.mean(1), rtol=1e-4)
        np.testing.assert_allclose(weights["rms"], np.sqrt((direct**2).mean(1)), rtol=1e-4)
    assert probes.weights(small.decoder(small.config("mha"))) == []


def inside(rms, streams):
    weights = {"layer": 2, "kind": "value", "sources": [0, 1], "mean": [0.5, -1.0], "rms": rms}
    norms = {"step": 1, "all": [0.1] * 8, "key": [0.1] * 4 + [None] * 4, "value": [0.2] * 8}
    return {"weights": [weights], "streams": {"value": streams}, "gradients": [norms]}


def test_a_share_counts_the_size_of_the_source():
    (share,) = shares_of({"inside": inside([0.5, 1.0], {"0": 6.0, "1": 1.0})})
    assert share.by_weight == pytest.approx([1 / 3, 2 / 3])
    assert share.by_size == [0.75, 0.25] and share.means == [0.5, -1.0]


def record(study, cell, loss, within):
    values = {"heldout": {"loss": loss, "bits_per_byte": loss / 2}}
    return records.make(study, cell, {"tokenizer": "abc"}, values, 1.0) | {"inside": within}


def test_the_report_compares_with_the_shared_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_COMMITTED", tmp_path)
    base, own = tmp_path / "scaling" / "records", tmp_path / "own"
    for row, losses in {"fusedkv": (5.0, 5.5), "mha": (4.5, 5.25)}.items():
        for seed, loss in enumerate(losses):
            cell = Cell(grids.SIZE, row, Seeds(seed, seed), grids.RATE)
            records.write(base, record(scaling.get_study(), cell, loss, None))
    other = Cell(grids.SIZE, "mha", Seeds(0, 0), grids.RATE / 2)
    records.write(base, record(scaling.get_study(), other, 1.0, None))
    for seed, loss in enumerate((5.25, 5.75, 9.0)):
        cell = Cell(grids.SIZE, "normal", Seeds(seed, seed), grids.RATE)
        records.write(own / "ablation", record(grids.ablation(), cell, loss, None))
    diverged = Cell(grids.SIZE, "iterative", Seeds(0, 0), grids.RATE)
    records.write(own / "ablation", record(grids.ablation(), diverged, float("inf"), None))
    deep = Cell(grids.DEEP, "fusedkv", Seeds(1, 1), grids.RATE)
    within = inside([0.5, 1.0], {"0": 6.0, "1": 1.0})
    records.write(own / "depth", record(grids.depth(), deep, 5.125, within))
    text = report.write(report.read(own), tmp_path / "out")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    found = {cells[0]: cells[2:] for cells in rows if len(cells) == 6}
    assert found["`mha`"][0] == "2" and found["`mha`"][1].startswith("4.8750 ± ")
    assert found["`normal`"][0] == "3" and found["`fusedkv`"][2] == ""
    assert found["`normal`"][2] == "**+0.2500 ± 0.0000**"  # on the draws that both have
    assert found["`fusedkv`"][3].startswith("+0.3750 ± ")
    assert "`iterative`" not in found
    assert (tmp_path / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "gradients.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "dense_fusion.png").exists()
    assert ["`fusedkv`", "1", "5.1250", *["0.1000"] * 8] in rows
    assert ["`fusedkv`", "1", "values of layer 2", "+0.50 (33%, 75%)", "-1.00 (67%, 25%)"] in rows


def test_a_worker_trains_and_looks_inside(tmp_path, monkeypatch):
    base = scaling.get_study()
    model = base.sizes[grids.SIZE].model.replace(vocab_size=300, d_model=16, d_ff=16, max_length=32)
    toy = dataclasses.replace(
        base,
        vocab_size=300,
        seq_len=32,
        tokens_per_parameter=1,
        sizes={grids.SIZE: Size(model=model, batch_size=32, learning_rate=grids.RATE)},
        draws=(Seeds(0, 0),),
    )
    monkeypatch.setattr(scaling, "get_study", lambda: toy)
    monkeypatch.setattr(grids, "ABLATION", {"normal": grids.ABLATION["normal"]})
    monkeypatch.setattr(grids, "DEPTH", {"dense_fusion": grids.DEPTH["dense_fusion"]})
    monkeypatch.setattr(report, "_COMMITTED", tmp_path / "none")
    rng = random.Random(0)
    (tmp_path / "data").mkdir()
    for name, count in (("train.jsonl", 300), ("valid.jsonl", 40)):
        texts = (
            " ".join(rng.choices("one two three four five six".split(), k=60)) for _ in range(count)
        )
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / "data" / name).write_text("".join(lines))
    line = ["--study=paper", f"--data={tmp_path}/data", f"--workdir={tmp_path}/work"]
    line.append(f"--output={tmp_path}/out")
    (out,) = commands.run_here("reproduce", line)
    assert json.loads(out.splitlines()[-1]) == {
        "study": "paper",
        "runs": {"ablation": 1, "depth": 1},
    }
    (file,) = (tmp_path / "out" / "records" / "depth").glob("*.json")
    found = json.loads(file.read_text())["inside"]
    steps = [norms["step"] for norms in found["gradients"]]
    assert len(steps) > 3 and steps == sorted(steps)
    assert len(found["weights"]) == 8 and list(found["streams"]["key"]) == ["0", "1", "2", "3"]
    for name in ("dense_fusion.png", "ablation.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    before = file.stat().st_mtime_ns
    (again,) = commands.run_here("reproduce", line)
    assert file.stat().st_mtime_ns == before
    assert again.endswith(out[out.index("# Study") :])
    (checked,) = commands.run_here("reproduce", [*line, f"--check={file.stem}"])
    assert "to the last bit" in checked


def test_mistakes(tmp_path):
    for line, message in (
        (["--layouts=mha"], "--layouts has no effect with --study=paper"),
        ([], "--data is missing"),
        (["--report", f"--output={tmp_path}"], "holds no records of --study=paper"),
        (["--check=mha"], "there is no such run"),
    ):
        with pytest.raises(commands.Refused, match=message):
            commands.run_here("reproduce", ["--study=paper", *line])


def test_every_variant_differs_from_fusedkv():
    study = grids.ablation()
    models = {repr(study.model(grids.SIZE, row).kv_layout) for row in grids.ABLATION}
    base = scaling.get_study()
    shared = {repr(base.model(grids.SIZE, row).kv_layout) for row in grids.SHARED}
    assert len(models) == len(grids.ABLATION) and not models & shared
