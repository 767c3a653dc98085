"""`python -m experiments.describe`: drawings, costs and the list of layouts."""

import pathlib
import subprocess
import sys

from fusedkv_jax import costs, layouts, presets

ROOT = pathlib.Path(__file__).parents[2]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.describe", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_layout_alone_is_its_drawing():
    done = run("--layout=cla:k=3", "--num_layers=9")
    assert done.returncode == 0, done.stderr
    assert done.stdout == layouts.draw(layouts.get("cla", 9, k=3)) + "\n"


def test_a_preset_adds_its_costs_and_parameters():
    done = run("--preset=332m", "--num_layers=6", "--length=100", "--dtype=float32")
    assert done.returncode == 0, done.stderr
    config = presets.get("332m", num_layers=6)
    assert done.stdout.startswith(layouts.draw(config.kv_layout))
    printed = dict(
        line.split()
        for line in done.stdout.splitlines()
        if line.startswith("  ") and "[" not in line and len(line.split()) == 2
    )
    expected = costs.summary(config, 100, "float32")
    assert int(printed["cache_bytes"].replace(",", "")) == expected["cache_bytes"]
    assert int(printed["decode_flops"].replace(",", "")) == expected["decode_flops"]
    assert float(printed["cache_ratio"]) == 0.5
    for part, count in costs.parameter_breakdown(config).items():
        assert printed[part] == f"{count:,}"


def test_the_list_names_every_layout_and_option():
    done = run("--list")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(layouts.names())
    cla = lines.index("cla")
    assert "Cross-layer attention" in lines[cla + 1]
    assert lines[cla + 2].strip() == "options: k=2"


def test_a_mistake_is_one_line():
    done = run("--layout=fusedkv", "--num_layers=7")
    assert done.returncode == 2
    assert "num_layers=7 is odd; give split=" in done.stderr
    assert len(done.stderr.splitlines()) == 1
