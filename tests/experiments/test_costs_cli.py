"""`python -m experiments.costs`: its table, its JSON document and its mistakes."""

import json
import pathlib
import subprocess
import sys

import pytest

from fusedkv_jax import costs, layouts, presets

ROOT = pathlib.Path(__file__).parents[2]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.costs", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_rows_are_the_librarys_costs():
    done = run(
        "--preset=demo",
        "--preset=332m",
        "--layout=mha",
        "--layout=cla:k=4",
        "--length=1000",
        "--dtype=int8",
        "--num_kv_heads=2",
    )
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    document = json.loads(last)
    assert (document["length"], document["dtype"]) == (1000, "int8")
    expected = []
    for preset in ("demo", "332m"):
        for layout in ("mha", "cla:k=4"):
            config = presets.get(preset, layout, num_kv_heads=2)
            row = {"preset": preset, "layout": layout} | costs.summary(config, 1000, "int8")
            expected.append(row)
    assert document["rows"] == expected
    assert document["rows"][0]["cache_ratio"] == pytest.approx(2 / 6)
    # 332m is the paper's name for a model of 463.5M parameters.
    (note,) = [line for line in table if "paper" in line]
    assert "131.1M in the embedding, 131.1M in the output head" in note
    millions = f"{expected[2]['parameters'] / 1e6:.1f}"
    assert any(line.split()[:2] == ["mha", millions] for line in table)


def test_by_default_every_layout_is_shown_and_a_refused_one_says_why():
    done = run("--preset=650m_mla")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["layout"] for row in rows] == list(layouts.names())
    refused = {row["layout"] for row in rows if "refused" in row}
    assert refused == {
        "fusedkv_lite",
        "lite_learnable",
        "lite_reversed",
        "svformer",
        "svformer_half",
        "resformer",
    }
    by_name = {row["layout"]: row for row in rows}
    assert by_name["mha"]["cache_ratio"] == 0.25
    assert by_name["fusedkv"]["cache_ratio"] == 0.125


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--preset=demo", "--layout=fusedkw"],
            "unknown layout 'fusedkw'; did you mean fusedkv",
        ),
        (["--dtype=bf16"], "dtype='bf16' is no dtype"),
    ],
)
def test_mistakes_are_one_line(flags, message):
    done = run(*flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
