"""The Colab notebooks: paired with their scripts, run from top to bottom, fit the free TPU."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jupytext
import nbclient
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "colab"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
PICTURES = {"fusedkv_demo": 2, "half_the_cache": 1, "design_a_layout": 2}
V5E_BYTES = 16 * 2**30
# libtpu reads the environment when jax is imported: hence a process of its own.
PROGRAM = pathlib.Path(__file__).with_name("compile_notebook.py")


def cells(notebook):
    return [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in notebook.cells]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_and_script_hold_the_same_cells(name):
    script, notebook = (jupytext.read(FOLDER / f"{name}{end}") for end in (".py", ".ipynb"))
    assert cells(script) == cells(notebook), "run: jupytext --to ipynb on the script"
    # Readers see what comes of it before they run it, and Colab opens it on a TPU.
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures == PICTURES[name]
    assert "/tmp/" not in json.dumps(outputs), "outputs name a folder of the machine"
    assert not any(output.output_type == "error" for output in outputs)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 300_000
    assert notebook.metadata["accelerator"] == "TPU"
    install = next(c.source for c in script.cells if c.cell_type == "code")
    assert (
        '\n    %pip install -q "fusedkv_jax{extra} @ git+https://' in install
    )  # a magic in Jupyter


@pytest.fixture
def executed(monkeypatch, tmp_path):
    """A function that runs a notebook, and returns what it printed."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

    def run(name):
        notebook = jupytext.read(FOLDER / f"{name}.py")
        place = {"metadata": {"path": str(tmp_path)}}
        client = nbclient.NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources=place
        )
        client.execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert [o.name for o in outputs if o.output_type == "stream" and o.name == "stderr"] == []
        assert sum("image/png" in o.get("data", {}) for o in outputs) == PICTURES[name]
        return "".join(output.get("text", "") for output in outputs)

    return run


@pytest.mark.slow
def test_the_demo_runs_at_toy_size(executed, tmp_path):
    text = executed("fusedkv_demo")
    assert "memory of one: not reported" in text
    # Two streams of 2 heads of 32 channels in 4 bytes, of four layers or of two.
    assert " mha: 0.50 MiB for 256 tokens, 2,048 bytes per token, prompts pass 4 of 4" in text
    assert " fusedkv: 0.25 MiB for 256 tokens, 1,024 bytes per token, prompts pass 2 of 4" in text
    losses = [
        json.loads(line)["eval/bits_per_byte"]
        for path in tmp_path.glob("runs/fusedkv_demo_cpu/*/metrics.jsonl")
        for line in path.read_text().splitlines()
        if "eval/bits_per_byte" in line
    ]
    assert len(losses) == 4 and max(losses[1], losses[3]) < 6  # bits; 8 is knowing nothing


@pytest.mark.slow
def test_a_model_gets_half_the_cache(executed):
    text = executed("half_the_cache")
    found = re.findall(r"([\w, ]+): (\S+) nats per", text)
    losses = {name.strip(): float(nats) for name, nats in found}
    for layout in ("fusedkv", "cla"):
        assert losses[f"{layout}, fitted"] < losses[f"{layout}, dropped"]
    sizes = [int(size.replace(",", "")) for size in re.findall(r": (\S+) bytes for 256", text)]
    assert sizes[0] == 2 * sizes[1] == 2 * sizes[2]


@pytest.mark.slow
def test_a_layout_is_designed(executed):
    text = executed("design_a_layout")
    assert "0_1_2_f0+2s64x2_f0+2x3" in text and "source 5 is not a layer" in text
    found = re.findall(r"(\w+): (\S+) bits per byte, (\S+) bytes of cache", text)
    sizes = {name: int(size.replace(",", "")) for name, _, size in found}
    assert sizes == {"mha": 1024, "fusedkv": 512, "mine": 384}
    assert all(float(bits) < 6 for _, bits, _ in found)  # 8 is knowing nothing


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (tpu-compile)"
)
def test_fits_the_free_tpu():
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "PYTHONPATH": str(FOLDER.parents[1]),
    }
    done = subprocess.run(
        [sys.executable, PROGRAM, FOLDER / "fusedkv_demo.py"],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    # A quarter is left for evaluation and the runtime.
    assert max(report["train"], *report["decode"].values()) < 0.75 * V5E_BYTES
    for layout, cache in report["cache"].items():
        assert report["decode_aliased"][layout] >= cache > 0, layout  # donated
    assert report["cache"]["fusedkv"] == report["cache"]["mha"] / 2
