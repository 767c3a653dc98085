"""`tpu_decode` and `tpu_slices`: what is committed, and one cell computed again."""

import importlib.util
import json
import pathlib

import pytest

from experiments import tpu_decode, tpu_slices
from fusedkv_jax import presets
from fusedkv_jax.compile_ahead.chips import Slice
from tests.experiments import commands

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs/guides/tpu_slices.md").read_text()
RESULTS = {
    name: json.loads((ROOT / f"experiments/results/{name}.json").read_text())
    for name in ("tpu_decode", "tpu_slices")
}


@pytest.mark.parametrize("program", [tpu_decode, tpu_slices])
def test_the_page_shows_what_is_in_the_results(program):
    name = program.__name__.rpartition(".")[2]
    assert f"\n{program.tables(RESULTS[name])}\n" in PAGE


def test_decoding_moves_at_most_a_tenth_more_than_it_must():
    rows = [row for row in RESULTS["tpu_decode"] if "missing" not in row]
    missed = [row for row in rows if row["hbm_gb"] > 1.1 * row["least_gb"]]
    names = [(row["preset"], row["layout"], row["topology"]) for row in missed]
    assert len(rows) > 60 and names == [("332m", "gqa", "tpu7x:2x2x1")]  # the page says why


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="compiling needs libtpu")
def test_a_cell_again():
    found = tpu_decode.decode(tpu_decode.model("332m", "gqa", 1024), Slice.parse("v6e:2x2"))
    size = presets.get("332m", "mha", vocab_size=1024, num_kv_heads=8)
    heads = 2 * size.kv_heads * size.channels  # of keys and values
    weights = 2 * size.d_model**2 + size.d_model * heads + 3 * size.d_model * size.d_ff
    cache = 4 * 8192 * heads * 2
    least = size.num_layers * (2 * weights + cache) + 2 * 2 * 1024 * size.d_model
    assert found["least_gb"] == pytest.approx(least / 1e9, rel=1e-3)  # without norms
    assert found["layer_gb"] == pytest.approx(cache / 1e9, abs=1e-4)
    embedding = 2 * 1024 * size.d_model / 1e9  # of which a step reads some rows
    assert found["least_gb"] - embedding <= found["hbm_gb"] <= 1.1 * found["least_gb"]
    assert found["temporaries_gb"] < found["layer_gb"]


def test_a_run_replaces_the_selected_rows_and_no_others(tmp_path, monkeypatch):
    old = json.loads(json.dumps(RESULTS["tpu_slices"]))
    keys = {layout: f"train 332m {layout} v5e:16x16" for layout in ("fusedkv", "mha")}
    new = {"settings": "new", "peak": 2**30, "estimate": old[keys["mha"]]["estimate"]}
    for key in keys.values():
        old[key].pop("peak", None)
    path, page = tmp_path / "results.json", tmp_path / "page.md"
    path.write_text(json.dumps(old))
    page.write_text(PAGE)
    monkeypatch.setattr(tpu_slices, "train", lambda preset, layout, place: new)
    monkeypatch.setattr(tpu_slices, "serve", None)  # nobody asks for other programs
    selected = ["--presets=332m", "--slices=v5e:16x16", "--layouts=mha"]
    files = [f"--results={path}", f"--document={page}"]
    commands.run_here("tpu_slices", [*selected, *files])
    results = json.loads(path.read_text())
    assert results == old | {keys["mha"]: new} and list(results) == list(old)
    before, _, after = PAGE.partition(tpu_slices.tables(RESULTS["tpu_slices"]))
    assert page.read_text() == before + tpu_slices.tables(results) + after
    with pytest.raises(commands.Refused, match="--programs=serve is unknown"):
        commands.run_here("tpu_slices", ["--programs=serve", *files])


@pytest.mark.parametrize("program", ["tpu_decode", "tpu_slices"])
def test_a_page_without_marks_is_refused_before_the_work(tmp_path, program):
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("<!-- table -->\n<!-- decoding -->\nthe end\n")
    with pytest.raises(commands.Refused, match="needs one line"):
        commands.run_here(program, [f"--document={page}", f"--results={results}"])
    assert page.read_text().endswith("the end\n") and not results.exists()
