"""Training with several real processes on this machine, whatever happens to one of them."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.common import models
from fusedkv_jax import data
from fusedkv_jax.interop import uptrain
from fusedkv_jax.model import Decoder
from fusedkv_jax.sharding import MeshConfig
from fusedkv_jax.training import (
    Checkpoints,
    TrainConfig,
    load_model,
    make_optimizer,
    save_model,
    train,
)
from fusedkv_jax.training.checkpointing import manifest
from fusedkv_jax.training.checkpointing.directory import committed_steps
from fusedkv_jax.training.checkpointing.lock import lock_workdir
from fusedkv_jax.training.state import abstract_state

CONFIG = """
import json, pathlib
from fusedkv_jax.training import ExperimentConfig
def get_config():
    return ExperimentConfig.from_dict(json.loads(pathlib.Path({path!r}).read_text()))
"""
# Restores a checkpoint on the devices of all processes and saves it elsewhere.
RESAVE = """
import json, sys
import jax
from fusedkv_jax import data, processes
from fusedkv_jax.sharding import make_mesh
from fusedkv_jax.training import Checkpoints, ExperimentConfig, TrainProgram
config = ExperimentConfig.from_dict(json.loads(open(sys.argv[1]).read()))
processes.initialize(sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
program = TrainProgram(config, make_mesh(config.mesh))
iterator = data.make_train_iterator(config.data)
with Checkpoints(sys.argv[2], 1) as checkpoints:
    state, step = checkpoints.restore(program.state, iterator, config)
with Checkpoints(sys.argv[3], 1) as checkpoints:
    checkpoints.save(step, state, iterator, config)
"""


@pytest.fixture
def config(toy):
    """A model that compiles fast, on four devices in all."""
    return dataclasses.replace(
        toy,
        model=toy.model.replace(layout="mha", num_layers=2),
        train=TrainConfig(steps=12, log_every=1, checkpoint_every=5, eval_batches=2),
        mesh=MeshConfig(data=1, fsdp=4, devices=4),
    )


def _command(config, folder: pathlib.Path, *arguments: str) -> list[str]:
    path = folder / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    (folder / "config.py").write_text(CONFIG.format(path=str(path)))
    return ["-m", "experiments.train", f"--config={folder / 'config.py'}", *arguments]


def _start(commands: list[list[str]], devices: int) -> list[subprocess.Popen]:
    """Starts a process with so many devices for each command line."""
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            [sys.executable, *line], env=environment, stdout=pipe, stderr=pipe, text=True
        )
        for line in commands
    ]


def _launch(config, workdir, count: int, *arguments: str) -> list[subprocess.Popen]:
    """Starts `experiments.train` as `count` processes, with four devices together."""
    workdir.mkdir(exist_ok=True)
    flags = (f"--coordinator=localhost:{_port()}", f"--num_processes={count}")
    command = _command(config, workdir, f"--workdir={workdir}", *flags, *arguments)
    return _start([[*command, f"--process_id={i}"] for i in range(count)], 4 // count)


def _port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def _finish(running: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, standard output without Gloo's lines, standard error) of each process."""
    results = [process.communicate(timeout=300) for process in running]
    return [
        # Gloo's threads write into each other's lines.
        (process.returncode, re.sub(r".*(\[Gloo\]|peer ranks).*\n", "", out), error)
        for process, (out, error) in zip(running, results, strict=True)
    ]


def _run(config, workdir, count: int, *arguments: str) -> list[tuple[int, str, str]]:
    return _finish(_launch(config, workdir, count, *arguments))


def _wait_for_step(process: subprocess.Popen, step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(f"the run ended before step {step}")


def _losses(workdir) -> dict[int, float]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def _assert_close(found: dict[int, float], wanted: dict[int, float]) -> None:
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)


def _saved(config, workdir):
    """Every array of the newest checkpoint, and the next batch."""
    iterator = data.make_train_iterator(config.data)
    abstract = abstract_state(config.model, make_optimizer(config.optimizer, config.train.steps))
    with Checkpoints(workdir, 1) as checkpoints:
        restored = checkpoints.restore(abstract, iterator, config)
    assert restored is not None
    return jax.tree.leaves((restored, next(iterator)))


def test_two_processes_equal_one(config, tmp_path):
    alone = train(config, tmp_path / "alone")
    results = _run(config, tmp_path / "two", 2)
    assert [code for code, _, _ in results] == [0, 0], results
    (_, printed, _), (_, silent, _) = results
    assert silent.strip() == ""
    last = json.loads(printed.splitlines()[-1])
    assert last["eval/bits_per_byte"] == pytest.approx(
        alone.metrics["eval/bits_per_byte"], rel=1e-5
    )
    _assert_close(_losses(tmp_path / "two"), _losses(tmp_path / "alone"))
    directories = [tmp_path / name / "checkpoints" for name in ("alone", "two")]
    assert committed_steps(directories[0]) == committed_steps(directories[1]) == [5, 10, 12]
    *_, files = (manifest.verify(directory / "12").files for directory in directories)
    assert any("process_1/" in name for name in files)
    for x, y in zip(*(_saved(config, tmp_path / n) for n in ("alone", "two")), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_four_processes_stopped_killed_and_changed_in_number(config, tmp_path, capsys):
    settings = TrainConfig(steps=24, log_every=1, checkpoint_every=8, eval_batches=0)
    config = dataclasses.replace(config, train=settings)
    whole, parts, alone = (tmp_path / name for name in ("whole", "parts", "alone"))
    assert {code for code, _, _ in _run(config, whole, 4)} == {0}
    wanted = _losses(whole)

    running = _launch(config, parts, 4)
    _wait_for_step(running[0], 5)
    running[2].send_signal(signal.SIGTERM)  # to one alone: all stop, at the same step
    results = _finish(running)
    assert [code for code, _, _ in results] == [75] * 4, results
    summary = json.loads(results[0][1].splitlines()[-1])
    stopped = summary["step"]
    assert summary["interrupted"] == "SIGTERM" and 5 <= stopped < 16
    assert committed_steps(parts / "checkpoints") == [stopped]

    shutil.copytree(parts, alone)
    train(config, alone)  # one process goes on with the checkpoint of four
    assert f"resuming at step {stopped} " in capsys.readouterr().out
    _assert_close(_losses(alone), wanted)
    _check_resaved(config, parts, tmp_path)

    running = _launch(config, parts, 4)
    _wait_for_step(running[0], stopped + 4)
    running[3].kill()
    killed = time.monotonic()
    codes = [code for code, _, _ in _finish(running)]
    assert time.monotonic() - killed < 60
    assert codes[3] == -signal.SIGKILL and all(code not in (0, 2, 75) for code in codes)
    assert committed_steps(parts / "checkpoints")[-1] < 24
    assert {code for code, _, _ in _run(config, parts, 4)} == {0}
    assert _losses(parts) == wanted
    for x, y in zip(_saved(config, parts), _saved(config, whole), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_two_processes_fit_a_run_to_another_layout_and_learn_from_it(config, tmp_path):
    original, run = Decoder(config.model, rngs=nnx.Rngs(3)), tmp_path / "run"
    save_model(original, config, run)
    results = _run(
        config,
        tmp_path / "two",
        2,
        f"--init_from={run}",
        "--config.model.layout=cla",
        "--fit_tokens=256",
        "--config.distillation.logits=1",
        "--config.train.steps=1",
        "--config.train.eval_batches=0",
        "--config.optimizer.learning_rate=1e-30",
    )
    assert [code for code, _, _ in results] == [0, 0], results
    expected = uptrain.fit(original, "cla", models.training_tokens(config.data, 256))
    found = load_model(tmp_path / "two")[0]
    pair = (jax.tree.leaves(nnx.state(one, nnx.Param)) for one in (found, expected))
    for one, other in zip(*pair, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def _check_resaved(config, workdir, folder) -> None:
    """Two processes restore what four have saved, to the same bits and the same next batch."""
    copy, coordinator = folder / "copy", f"localhost:{_port()}"
    arguments = ["-c", RESAVE, str(workdir / "config.json"), str(workdir), str(copy), coordinator]
    results = _finish(_start([[*arguments, "2", str(i)] for i in range(2)], 2))
    assert [code for code, _, _ in results] == [0, 0], results
    for x, y in zip(_saved(config, copy), _saved(config, workdir), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_a_mesh_that_splits_heads_over_processes(config, tmp_path):
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, context=2, tensor=2, devices=4))
    alone = train(config, tmp_path / "alone")
    results = _run(config, tmp_path / "two", 2)
    assert [code for code, _, _ in results] == [0, 0], results
    _assert_close(_losses(tmp_path / "two"), _losses(tmp_path / "alone"))
    last = json.loads(results[0][1].splitlines()[-1])
    assert last["eval/bits_per_byte"] == pytest.approx(alone.metrics["eval/bits_per_byte"], 1e-5)
    _check_damage(config, tmp_path / "two")


def _check_damage(config, workdir) -> None:
    """Process 1 finds the damage in its share, and all go on from the step before."""
    losses, step = _losses(workdir), workdir / "checkpoints" / "12"
    files = [path for path in step.rglob("*") if "ocdbt.process_1/d/" in str(path)]
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"!")
    (code, printed, _), (other_code, silent, _) = _run(config, workdir, 2)
    assert (code, other_code, silent) == (0, 0, "")
    assert files[0].name in printed and printed.count("set aside as 12.damaged") == 1
    assert "resuming at step 10 " in printed
    assert _losses(workdir) == losses


@pytest.mark.slow
def test_what_does_not_fit_together_ends_all_with_one_line(config, tmp_path):
    workdir = tmp_path / "run"
    command = _command(config, tmp_path, f"--workdir={workdir}", "--num_processes=2")

    def start(*flags: list[str]) -> list[str]:
        """The last line of standard error of each process, all of which must end with code 2."""
        at = f"--coordinator=localhost:{_port()}"
        lines = [[*command, at, f"--process_id={i}", *own] for i, own in enumerate(flags)]
        results = _finish(_start(lines, 2))
        assert {(code, out) for code, out, _ in results} == {(2, "")}, results
        return [error.splitlines()[-1] for _, _, error in results]

    other = "error: process 1 has another configuration than process 0: train.seed: 0 -> 3; start"
    for line in start([], ["--config.train.seed=3"]):
        assert line.startswith(other)
    two = "--config.mesh.devices=2"
    for line in start([two, "--config.mesh.fsdp=2"], [two, "--config.mesh.fsdp=2"]):
        assert "cuts across the 2 processes" in line
    workdir.mkdir()
    with lock_workdir(workdir):
        for line in start([], []):
            assert f"is in use by process {os.getpid()}" in line
    assert (
        "not all processes met within 2 s (process 0 of 2, coord"
        in start(["--connect_seconds=2"])[0]
    )
