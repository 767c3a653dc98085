"""Experiment configurations: JSON round trip and refusals."""

import dataclasses
import json
import math

import pytest

from fusedkv_jax.training import ExperimentConfig, TrainConfig
from fusedkv_jax.training.config import first_difference


def test_json_round_trip(toy):
    assert ExperimentConfig.from_dict(json.loads(json.dumps(toy.to_dict()))) == toy


def test_round_trip_keeps_what_is_not_default(toy):
    config = dataclasses.replace(
        toy,
        model=toy.model.replace(layout="cla:k=2", qk_norm=False),
        train=TrainConfig(steps=7, peak_flops=1e12),
    )
    again = ExperimentConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config != toy


@pytest.mark.parametrize(
    ("part", "field", "hint"),
    [("train", "step", "steps"), ("optimizer", "learning_rat", "learning_rate")],
)
def test_unknown_fields_suggest_the_nearest(toy, part, field, hint):
    values = toy.to_dict()
    values[part][field] = 1
    with pytest.raises(ValueError, match=f"unknown field {part}.{field}; did you mean {hint}"):
        ExperimentConfig.from_dict(values)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", 10**12),
        ("grad_accumulation", 0),
        ("log_every", True),
        ("eval_every", -1),
        ("checkpoint_minutes", -1.0),
        ("checkpoint_minutes", math.nan),
        ("peak_flops", 0.0),
        ("peak_flops", math.inf),
    ],
)
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"train.{field}={value}"):
        TrainConfig(**{field: value})


def test_parts_that_do_not_fit_together(toy, with_train):
    with pytest.raises(ValueError, match="grad_accumulation=3 must divide data.batch_size=4"):
        with_train(grad_accumulation=3)
    with pytest.raises(ValueError, match="seq_len=128 is longer than model.max_length=64"):
        dataclasses.replace(toy, data=dataclasses.replace(toy.data, seq_len=128))


def test_first_difference_names_the_path():
    old = {"a": 1, "b": {"c": [1, 2], "d": 3}}
    assert first_difference(old, {"a": 1, "b": {"c": [1, 2], "d": 3}}) is None
    assert first_difference(old, {"a": 1, "b": {"c": [1, 4], "d": 5}}) == "b.c.1: 2 -> 4"
    assert first_difference([1], [1, 2], "x") == "x: [1] -> [1, 2]"
    written_out = first_difference({"layout": [{"own": True}] * 99}, {"layout": "mha"})
    assert len(written_out) < 120 and written_out.endswith("... -> 'mha'")
    assert first_difference(old, {"a": 1}, "x").startswith("x.b: {")
