"""The training loop: exact resuming after a kill, and what a finished run leaves behind."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from fusedkv_jax import data
from fusedkv_jax.training import Checkpoints, load_model, make_optimizer, train
from fusedkv_jax.training.evaluation import make_eval_step
from fusedkv_jax.training.monitoring.metrics import bits_per_byte
from fusedkv_jax.training.state import abstract_state

# Runs until the metrics of step 30 are due, then dies without any clean-up.
KILLED_RUN = """
import json, os, signal, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from fusedkv_jax.training import ExperimentConfig, loop

log = loop._Run._log
def log_or_die(self, writer, step, *rest):
    if step == 30:
        self.checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    log(self, writer, step, *rest)
loop._Run._log = log_or_die
loop.train(ExperimentConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2])
"""


def _final_state(config, workdir):
    """State and next batch of the newest checkpoint."""
    iterator = data.make_train_iterator(config.data)
    abstract = abstract_state(config.model, make_optimizer(config.optimizer, config.train.steps))
    with Checkpoints(workdir, config.train.keep_checkpoints) as checkpoints:
        restored = checkpoints.restore(abstract, iterator, config)
        assert restored is not None
        return restored[0], next(iterator)


def _losses(workdir: pathlib.Path) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len({record["step"] for record in records}) == len(records)
    return {record["step"]: record["train/loss"] for record in records}


def test_killed_and_resumed_run_is_bit_for_bit_the_whole_run(with_train, tmp_path):
    config = with_train(steps=40, checkpoint_every=20, log_every=10, grad_accumulation=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(config, whole).step == 40
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, json.dumps(config.to_dict()), str(parts)],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir},
    )
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (parts / "checkpoints").iterdir()] == ["20"]
    result = train(config, parts)
    assert (result.step, result.interrupted) == (40, None)
    wanted, found = _final_state(config, whole), _final_state(config, parts)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(x, y)
    assert int(found[0].step) == 40
    losses = _losses(whole)
    assert _losses(parts) == losses and list(losses) == [10, 20, 30, 40]
    assert losses[40] < losses[10] - 0.5


def test_finished_run_reports_evaluates_and_is_not_trained_again(toy, tmp_path, capsys):
    settings = dataclasses.replace(toy.train, steps=2, eval_batches=100, log_every=1)
    config = dataclasses.replace(toy, train=settings)
    result = train(config, tmp_path, profile_steps=(2, 5))
    model, _, step = load_model(tmp_path)
    assert step == result.step == 2
    graphdef, params = nnx.split(model, nnx.Param)
    total, count, num_bytes = 0.0, 0, 0
    for batch in data.make_eval_batches(toy.data):
        num_bytes += batch.pop("num_bytes")
        loss, tokens = make_eval_step(graphdef)(params, batch)
        total, count = total + float(loss), count + int(tokens)
    assert result.metrics["eval/loss"] == pytest.approx(total / count, rel=1e-6)
    assert result.metrics["eval/bits_per_byte"] == pytest.approx(
        bits_per_byte(total, num_bytes), rel=1e-6
    )
    printed = capsys.readouterr().out
    assert "compiling" in printed and "goodput " in printed and "; lost to " in printed
    assert any((tmp_path / "profile").rglob("*.xplane.pb"))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(config, tmp_path).step == 2
    assert "already at step 2 of 2" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert any((tmp_path / "tensorboard").iterdir())


def test_best_checkpoints_without_evaluation_are_warned_of(toy, tmp_path, capsys):
    settings = dataclasses.replace(toy.train, steps=1, eval_batches=0, keep_best=2)
    train(dataclasses.replace(toy, train=settings), tmp_path)
    assert "warning: train.keep_best=2 keeps nothing" in capsys.readouterr().out


def test_vocabulary_must_hold_the_tokenizer(toy, tmp_path):
    config = dataclasses.replace(toy, model=toy.model.replace(vocab_size=200))
    with pytest.raises(ValueError, match="or set vocab_size to at least 258"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps", [(0, 3), (5, 4)])
def test_profiled_steps_must_be_a_range(toy, tmp_path, steps):
    with pytest.raises(ValueError, match=f"profile_steps={steps[0]}:{steps[1]}; use 1 <= first"):
        train(toy, tmp_path / "run", profile_steps=steps)


def test_profiled_steps_must_be_steps_of_the_run(toy, tmp_path):
    with pytest.raises(ValueError, match="profile_steps=41:42, and the run has 40 steps"):
        train(toy, tmp_path / "run", profile_steps=(41, 42))


def test_workdir_must_not_be_a_file(toy, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is a file; name a directory"):
        train(toy, tmp_path / "file")


def test_workdir_must_not_lie_behind_a_broken_link(toy, tmp_path):
    (tmp_path / "disk").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ValueError, match="disk is a link to what does not exist"):
        train(toy, tmp_path / "disk" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_a_missing_wandb_is_one_clear_line(with_train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb_project=p needs the package wandb"):
        train(with_train(steps=1), tmp_path, wandb_project="p")
    assert train(with_train(steps=1), tmp_path).step == 1  # the directory is free and as it was
