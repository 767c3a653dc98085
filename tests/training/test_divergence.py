"""Runs whose loss is no longer finite end, say why, and keep the checkpoint of before."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from fusedkv_jax.sharding import MeshConfig, make_mesh
from fusedkv_jax.training import DivergedError, memory, train
from fusedkv_jax.training.checkpointing.directory import committed_steps
from fusedkv_jax.training.divergence import LIMIT, DivergenceCheck
from fusedkv_jax.training.interrupts import Interrupts


def test_a_bad_batch_passes_and_a_row_of_them_does_not(toy):
    check = DivergenceCheck(toy, lambda: 40)
    for step in range(1, 3 * LIMIT):
        check.count(step, math.nan if step % LIMIT else 2.0, 1.0)
    check.count(3 * LIMIT, 2.0, 1.0)
    with pytest.raises(DivergedError, match="since step 301 .now 400.* checkpoint is 40"):
        for step in range(3 * LIMIT + 1, 5 * LIMIT):
            check.count(step, 2.0, math.inf)


def test_the_end_of_a_run_is_judged_by_its_last_steps_and_its_evaluation(toy):
    check = DivergenceCheck(toy, lambda: None)
    check.finish(50, {"eval/loss": 2.0})
    with pytest.raises(DivergedError, match="held-out loss is not finite.*there is no checkpoint"):
        check.finish(50, {"eval/loss": math.nan})
    check.count(49, math.nan, 1.0)
    check.count(50, 2.0, math.nan)
    check.finish(50, {})
    with pytest.raises(DivergedError):
        check.finish(2, {})  # of two steps, one


def test_a_diverging_run_fails_with_valid_metrics_and_keeps_the_last_good_checkpoint(toy, tmp_path):
    config = dataclasses.replace(
        toy,
        optimizer=dataclasses.replace(toy.optimizer, learning_rate=1e30, warmup_steps=0),
        train=dataclasses.replace(
            toy.train, steps=8, log_every=1, checkpoint_every=0, checkpoint_minutes=1e-9
        ),
    )
    with pytest.raises(DivergedError, match=r"not finite since step 2.*learning_rate=1e\+30"):
        train(config, tmp_path, profile_steps=(3, 20))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))  # and another trace may begin
    jax.profiler.start_trace(tmp_path / "next")
    jax.profiler.stop_trace()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    norms = [json.loads(line, parse_constant=refuse)["train/grad_norm"] for line in lines]
    assert len(norms) == 8 and norms[0] > 0 and norms[1:] == [None] * 7
    assert committed_steps(tmp_path / "checkpoints") == [1]  # by time, and none that is worse


def test_a_run_that_is_interrupted_among_bad_steps_goes_on_from_before_them(
    toy, tmp_path, monkeypatch, capsys
):
    config = dataclasses.replace(
        toy,
        optimizer=dataclasses.replace(toy.optimizer, learning_rate=1e30, warmup_steps=0),
        train=dataclasses.replace(toy.train, checkpoint_every=0, checkpoint_minutes=1e-9),
    )
    polls = iter([None] * 5 + ["SIGTERM"])

    def poll(interrupts):
        interrupts.agreed = next(polls)
        return interrupts.agreed

    monkeypatch.setattr(Interrupts, "poll", poll)
    result = train(config, tmp_path)
    assert (result.step, result.interrupted) == (6, "SIGTERM")
    assert committed_steps(tmp_path / "checkpoints") == [1]
    printed = capsys.readouterr().out
    assert "SIGTERM: step 6 is not saved, as the last 5 losses" in printed
    assert "go on from step 1" in printed


def test_devices_that_a_run_does_not_use_hold_nothing():
    compiled = jax.jit(lambda x: x + 1).lower(jnp.zeros(1000)).compile()
    assert jax.local_device_count() > 1
    assert 8000 <= memory.step_bytes(compiled, make_mesh(MeshConfig(devices=1))) < 12000


def test_what_the_machine_cannot_hold_is_refused_before_it_is_tried(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_memory", lambda: 1000.0)
    with pytest.raises(
        memory.InsufficientMemoryError, match="state of the model .* lower data.batch_size"
    ):
        train(toy, tmp_path)
