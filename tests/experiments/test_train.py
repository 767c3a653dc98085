"""The train and evaluate binaries as their users meet them."""

import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.experiments.commands import check_mistakes

CONFIG = """
from fusedkv_jax import ModelConfig
from fusedkv_jax.data import DataConfig
from fusedkv_jax.training import ExperimentConfig, OptimizerConfig, TrainConfig

def get_config():
    return ExperimentConfig(
        name="toy",
        model=ModelConfig(vocab_size=258, num_layers=4, d_model=16, num_heads=2, d_ff=32,
                          max_length=64, layout="fusedkv"),
        data=DataConfig(source={source!r}, seq_len=32, batch_size=4, holdout_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        train=TrainConfig(steps=1000000, log_every=5, eval_batches=2),
    )
"""


@pytest.fixture(autouse=True)
def share_compiled_programs(monkeypatch):
    """The programs that these tests start use the tests' compilation cache."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(path of a config file, folder of its text)."""
    folder = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    (folder / "text").mkdir()
    for i in range(30):
        words = rng.choice(["def", "key", "value", "return", "größer", "\n"], size=60)
        (folder / "text" / f"{i}.txt").write_text(" ".join(words), encoding="utf-8")
    (folder / "toy.py").write_text(CONFIG.format(source=str(folder / "text")))
    return folder / "toy.py", folder / "text"


def _run(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def _processes(coordinator, num_processes, process_id):
    values = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def test_mistakes_end_in_one_line_and_exit_code_2(toy, tmp_path):
    config = f"--config={toy[0]}"
    workdir = f"--workdir={tmp_path / 'run'}"
    (tmp_path / "file").write_text("not a directory")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "wrong.py").write_text("def get_config():\n    return {}\n")
    cases = [
        ([workdir], "--config is missing; choose "),
        ([config], "--workdir is missing"),
        (["--config=dem", workdir], "--config=dem is unknown; did you mean demo?"),
        (["--config=nothing.py", workdir], "no such file or folder"),
        ([f"--config={tmp_path}/empty.py", workdir], "defines no get_config()"),
        ([f"--config={tmp_path}/wrong.py", workdir], "returned dict, not an ExperimentConfig"),
        ([config, "--wrkdir=x"], "unknown flag --wrkdir; did you mean --workdir?"),
        ([config, workdir, "extra"], "unexpected argument 'extra'"),
        ([config, workdir, "--config.train.stps=3"], "did you mean --config.train.steps"),
        ([config, workdir, "--config.steps=3"], "did you mean --config.train.steps"),
        ([config, workdir, "--config.train.steps=many"], "train.steps=many is not of type int"),
        ([config, workdir, "--config.train.steps"], "write --config.train.steps=VALUE"),
        (
            [config, workdir, "--config.train.steps=-1"],
            "train.steps=-1; use a whole number from 1",
        ),
        ([config, workdir, "--config.model.layout=fusedkw"], "fusedkv"),
        ([config, workdir, "--config.model.num_heads=3"], "num_heads=3"),
        ([config, workdir, "--config.data.source=/no/such/text"], "/no/such/text"),
        ([config, workdir, "--config.data.tokenizer=/no/tokenizer.json"], "/no/tokenizer.json"),
        ([config, workdir, "--config.data.holdout_fraction=0"], "holdout_fraction"),
        ([config, workdir, "--config.model.vocab_size=100"], "vocab_size"),
        ([config, f"--workdir={tmp_path}/file"], "is a file; name a directory"),
        ([config, workdir, "--profile_steps=5"], "--profile_steps=5 must be FIRST:LAST"),
        ([config, workdir, "--profile_steps=5:4"], "profile_steps=5:4; use 1 <= first <= last"),
        ([config, workdir, "--num_processes=2"], "coordinator and process_id missing"),
        ([config, workdir, *_processes("node0", 2, 0)], "coordinator=node0 must be HOST:PORT"),
        ([config, workdir, *_processes("node0:1", 2, 2)], "process_id=2 must be from 0 to"),
    ]
    check_mistakes("train", cases)


@pytest.mark.slow
def test_interrupt_saves_and_the_same_command_goes_on(toy, tmp_path):
    config, text = toy
    workdir = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "experiments.train"),
        *(f"--config={config}", f"--workdir={workdir}"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        lines = []
        for line in running.stdout:
            lines.append(line)
            if line.startswith("step 5/"):
                break
        second = _run("train", *command[3:])
        assert second.returncode == 2 and second.stderr.count("\n") == 1
        assert f"is in use by process {running.pid}" in second.stderr
        running.send_signal(signal.SIGTERM)
        lines += running.stdout.readlines()
    assert running.returncode == 75
    summary = json.loads(lines[-1])
    step = summary["step"]
    assert summary["interrupted"] == "SIGTERM" and step >= 5
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(step)]

    again = _run("train", *command[3:], f"--config.train.steps={step + 2}")
    assert again.returncode == 0, again.stderr
    assert again.stderr == ""
    assert f"resuming at step {step} " in again.stdout
    final = json.loads(again.stdout.splitlines()[-1])
    assert (final["step"], final["interrupted"]) == (step + 2, None)

    # The newest checkpoint, evaluated on the same batches, gives the same figures.
    report = _run("evaluate", f"--workdir={workdir}", "--max_batches=2")
    assert report.returncode == 0, report.stderr
    figures = json.loads(report.stdout.splitlines()[-1])
    assert figures["step"] == step + 2
    assert figures["bits_per_byte"] == pytest.approx(final["eval/bits_per_byte"], rel=1e-5)
    assert f"bits_per_byte  {figures['bits_per_byte']:.4f}" in report.stdout

    one_file = _run("evaluate", f"--workdir={workdir}", f"--source={text / '3.txt'}")
    figures = json.loads(one_file.stdout.splitlines()[-1])
    assert figures["bytes"] == (text / "3.txt").stat().st_size


def test_evaluate_mistakes(tmp_path):
    missing = _run("evaluate", f"--workdir={tmp_path}/none")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: there is no checkpoint in")
    assert missing.stderr.count("\n") == 1
