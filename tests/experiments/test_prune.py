"""`python -m experiments.prune`: fewer reads, step by step, on a run of a few steps."""

import json

import pytest

from fusedkv_jax.training import train
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
