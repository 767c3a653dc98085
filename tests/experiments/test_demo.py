"""The demonstration at toy size: its figures, its pictures, and running it again."""

import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib import image

import fusedkv_jax as fkv
from experiments import demo
from experiments.common import pictures, runs
from fusedkv_jax import data
from fusedkv_jax.training import load_model
from fusedkv_jax.training.interrupts import Interrupts
from tests.experiments import commands

TIMING = demo.Timing(prompt_length=40, new_tokens=4, repeats=1)


@pytest.fixture(scope="module")
def shown(comparison_config, tmp_path_factory):
    """(work directory, results) of the demo."""
    workdir = tmp_path_factory.mktemp("demo")
    return workdir, demo.compare(comparison_config, workdir, TIMING)


def bits_per_byte(model, config):
    """Of the held-out text, from the model's logits in float64."""
    nats, num_bytes = 0.0, 0
    for batch in data.make_eval_batches(config.data):
        inputs = (jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "positions"))
        logits = np.asarray(model(*inputs), np.float64)
        chosen = np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        nats += ((np.logaddexp.reduce(logits, axis=-1) - chosen) * batch["loss_mask"]).sum()
        num_bytes += batch["num_bytes"]
    return nats / num_bytes / math.log(2)


def test_figures_are_those_of_the_trained_models(shown):
    workdir, results = shown
    assert list(results["layouts"]) == ["mha", "fusedkv"]
    for layout, figures in results["layouts"].items():
        model, config, step = load_model(workdir / layout)
        assert (step, config.model.kv_layout.spec) == (12, layout)
        assert figures["bits_per_byte"] == pytest.approx(bits_per_byte(model, config), rel=1e-5)
        params = jax.tree.leaves(nnx.state(model, nnx.Param))
        assert figures["parameters"] == sum(leaf.size for leaf in params)
        cache = fkv.KVCache.create(config.model, batch_size=3, max_length=8)
        assert figures["cache_bytes_per_token"] == cache.nbytes / 24
        assert 0 < figures["output_token_seconds"] < 10 and 0 < figures["first_token_seconds"] < 10
    assert results["ratios"]["cache_bytes_per_token"] == 0.5
    both = [figures["bits_per_byte"] for figures in results["layouts"].values()]
    assert results["ratios"]["bits_per_byte"] == both[1] / both[0]
    assert results["train_tokens"] == 12 * 4 * 32
    assert json.loads((workdir / "results.json").read_text()) == results


def test_both_layouts_had_the_same_budget(shown):
    workdir, _ = shown
    first, second = (load_model(workdir / layout)[1] for layout in ("mha", "fusedkv"))
    assert (first.data, first.optimizer, first.train) == (
        second.data,
        second.optimizer,
        second.train,
    )
    assert first.model.replace(layout="fusedkv") == second.model


def test_table(shown):
    _, results = shown
    lines = demo.table(results).splitlines()
    assert lines[0].split() == ["mha", "fusedkv", "ratio"]
    loss, cache = (next(line for line in lines if line.startswith(s)) for s in ("valid", "cache"))
    mha, fused = (results["layouts"][layout] for layout in ("mha", "fusedkv"))
    assert loss.split()[-3:-1] == [f"{x['bits_per_byte']:.4f}" for x in (mha, fused)]
    # Four layers and two of them, keys and values of 2 heads of 8 channels, 4 bytes each.
    assert cache.split()[-3:] == ["512", "256", "0.500"]
    assert len({len(line) for line in lines}) == 1


def test_pictures(shown):
    workdir, _ = shown
    for name in ("loss_curves.png", "fusion_weights.png"):
        pixels = image.imread(workdir / name)
        assert min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > 0.01


def test_again_shows_the_results_without_training(shown, comparison_config, monkeypatch):
    workdir, results = shown
    monkeypatch.setattr(runs.training, "train", lambda *_: pytest.fail("trained again"))
    again = demo.compare(comparison_config, workdir, TIMING)
    measured = ("first_token_seconds", "output_token_seconds")
    for layout, figures in results["layouts"].items():
        for name, value in figures.items():
            assert name in measured or again["layouts"][layout][name] == value, name


def test_a_directory_holds_runs_of_one_setting(shown, comparison_config):
    workdir, _ = shown
    other = dataclasses.replace(comparison_config.optimizer, learning_rate=0.02)
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate: 0\.01 -> 0\.02"):
        demo.compare(dataclasses.replace(comparison_config, optimizer=other), workdir, TIMING)


def test_a_run_that_was_cut_off_goes_on(shown, comparison_config, tmp_path, monkeypatch, capsys):
    class Signal(Interrupts):
        def __init__(self):
            super().__init__()
            self.received = "SIGTERM"

    with monkeypatch.context() as patch:
        patch.setattr("fusedkv_jax.training.loop.Interrupts", Signal)
        with pytest.raises(runs.Interrupted, match="SIGTERM"):
            runs.complete(comparison_config, tmp_path / "run")
    record = json.loads((tmp_path / "run" / runs.RUN_FILE).read_text())
    assert record["result"] is None and record["seconds"] > 0
    run = runs.complete(comparison_config, tmp_path / "run")
    assert "resuming at step 1 " in capsys.readouterr().out
    assert run.seconds > record["seconds"] and not run.was_finished
    # As if it had not been cut off.
    assert run.bits_per_byte == shown[1]["layouts"]["fusedkv"]["bits_per_byte"]


def test_fusion_weights_are_means_by_layer_and_source():
    weights = {
        ("key", 2): np.array([[[1.0, -3.0]], [[2.0, 2.0]]]),  # [J, K, H]: of layers 0 and 1
        ("value", 2): np.array([[[0.5, 0.5]], [[-1.0, 1.0]]]),
        ("key", 3): np.array([[[4.0, 4.0]], [[0.0, 1.0]]]),
        ("value", 3): np.array([[[-2.0, -2.0]], [[6.0, 0.0]]]),
    }
    model = _model("fusedkv", weights)
    layers, columns, figures = pictures.fusion_weights(model)
    assert layers == [2, 3]
    assert columns == ["key of 0", "key of 1", "value of 0", "value of 1"]
    np.testing.assert_array_equal(figures["mean"], [[-1, 2, 0.5, 0], [4, 0.5, -2, 3]])
    np.testing.assert_array_equal(figures["magnitude"], [[2, 2, 0.5, 1], [4, 0.5, 2, 3]])


def test_fusion_weights_of_a_residual_name_the_layer_itself():
    # Values of layer 0 are added to those of each later layer; keys are the layers' own.
    weights = {("value", i): np.array([[[float(i)]], [[10.0 * i]]]) for i in (1, 2, 3)}
    layers, columns, figures = pictures.fusion_weights(_model("resformer", weights))
    assert layers == [1, 2, 3]
    assert columns == ["value of itself", "value of 0"]
    np.testing.assert_array_equal(figures["mean"], [[10, 1], [20, 2], [30, 3]])


def test_a_layout_without_weights_has_no_picture(tmp_path):
    assert not pictures.draw_fusion_weights(_model("mha", {}), tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


def _model(layout, weights):
    config = fkv.ModelConfig(
        vocab_size=258, num_layers=4, d_model=16, num_heads=2, d_ff=32, layout=layout
    )
    return types.SimpleNamespace(config=config, mixing=lambda: weights)


def test_loss_curve_leaves_out_what_was_not_finite():
    history = [
        {"step": 1, "train/loss": 5.0},
        {"step": 1, "eval/loss": 4.5},
        {"step": 2, "train/loss": None},
        {"step": 3, "train/loss": 4.0},
    ]
    assert pictures.loss_curve(history, "train") == ([1, 3], [5.0, 4.0])
    assert pictures.loss_curve(history, "eval") == ([1], [4.5])


def test_mistakes(tmp_path):
    workdir = f"--workdir={tmp_path / 'demo'}"
    (tmp_path / "file").write_text("")
    commands.check_mistakes(
        "demo",
        [
            ([], "--workdir is missing"),
            ([workdir, "--config.train.step=3"], "did you mean --config.train.steps"),
            ([workdir, "--config.model.layout=mha"], "model.layout=mha is what the demo compares"),
            ([workdir, "--config.train.eval_batches=0"], "train.eval_batches=0"),
            ([workdir, "--repeats=0"], "repeats=0; use 1 or more"),
            ([f"--workdir={tmp_path}/file"], "file' is a file; name a folder"),
        ],
    )
