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
    # The same of a folder that somebody was given.
    folder, text, made = (str(tmp_path / name) for name in ("folder", "text.txt", "made"))
    (tmp_path / "text.txt").write_text("Layers read what others keep.\n" * 200)
    given = [f"--model={folder}", "--tokenizer=byte", f"--source={text}", *line[1:-1]]
    given.append("--budget=1.25")
    exported, again, nowhere = commands.run_several(
        [
            ("convert", [f"--workdir={tmp_path}", f"--output={folder}"]),
            ("prune", [*given, f"--output={made}", "--max_batches=1"]),
            ("prune", given),
        ]
    )
    assert exported[0] == 0 and again[0] == 0, (exported, again)
    assert nowhere[0] == 2 and "--output is missing" in nowhere[2]
    (step,) = json.loads(again[1].splitlines()[-1])["steps"][-1:]
    assert step["reads"] == pytest.approx(1.25)
    assert load_model(f"{made}/budget_1.25")[2] == 0
    # A second run loses nothing.
    ((code, _, error),) = commands.run("prune", line)
    assert code == 2 and "exists already" in error
