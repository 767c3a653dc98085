"""`python -m experiments.prune`: fewer reads, step by step, on a run of a few steps."""

import json

import pytest
from flax import nnx

from fusedkv_jax import data
from fusedkv_jax.training import evaluate, load_model, train
from fusedkv_jax.training.evaluation import make_eval_step
from tests.experiments import commands


@pytest.mark.slow
@pytest.mark.usefixtures("share_compiled_programs")
def test_reads_fall_to_the_budget_and_the_whole_model_comes_first(comparison_config, tmp_path):
    train(comparison_config, tmp_path)
    line = [f"--workdir={tmp_path}", "--texts=2", "--length=16", "--rounds=1", "--budget=1"]
    ((code, out, error),) = commands.run("prune", line)
    assert code == 0, error
    report = json.loads(out.splitlines()[-1])
    reads = [step["reads"] for step in report["steps"]]
    # Four layers, two of which read two sources for keys and two for values.
    assert reads == pytest.approx([1.5, 1.375, 1.25, 1.125, 1.0])
    assert report["steps"][0]["divergence"] == 0 and report["steps"][-1]["divergence"] > 0
    assert [row["model"] for row in report["models"]] == ["whole", "budget 1"]
    assert error.count("reads ") == 4  # a line for each step, while it runs
    pruned = tmp_path / "pruned" / "budget_1"
    assert report["workdirs"] == [str(pruned)]
    model, config, step = load_model(pruned)
    assert (step, config.data) == (0, comparison_config.data)
    streams = [s for layer in model.config.kv_layout.layers for s in (layer.key, layer.value)]
    assert max(len(stream.sources) for stream in streams) == 1
    batches = data.make_eval_batches(config.data, 16)
    graphdef, params = nnx.split(model, nnx.Param)
    loss = evaluate(make_eval_step(graphdef), params, batches).metrics["loss"]
    assert loss == pytest.approx(report["models"][1]["loss"], abs=1e-4)
    # A second run loses nothing.
    ((code, _, error),) = commands.run("prune", line)
    assert code == 2 and "exists already" in error
