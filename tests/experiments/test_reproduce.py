"""The small reproduction at toy size: its table, skipping finished runs, and its mistakes."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import reproduce
from experiments.common import runs
from experiments.configs import claim_small
from fusedkv_jax import costs
from fusedkv_jax.training import load_model
from tests.experiments import commands

NAMES, SEEDS = ["mha", "fusedkv"], [3, 5]


@pytest.fixture(scope="module")
def config(comparison_config):
    train = dataclasses.replace(comparison_config.train, steps=3, eval_every=0)
    return dataclasses.replace(comparison_config, train=train)


@pytest.fixture(scope="module")
def done(config, tmp_path_factory):
    """(work directory, results)."""
    workdir = tmp_path_factory.mktemp("claim")
    return workdir, reproduce.reproduce(config, workdir, NAMES, SEEDS)


def test_each_run_has_the_layout_and_the_seed_of_its_row(done, config):
    workdir, _ = done
    for name in NAMES:
        for seed in SEEDS:
            _, run, step = load_model(workdir / name / f"seed_{seed}")
            assert (run.model.kv_layout.spec, step) == (name, 3)
            assert (run.train.seed, run.data.seed) == (seed, seed)
            assert run.optimizer == config.optimizer
            assert dataclasses.replace(run.data, seed=0) == config.data


def _half_width(values):
    """Of the 95 % interval of two values' mean: Student's t has 12.706 there."""
    assert len(values) == 2
    return 12.7062 * values.std(ddof=1) / np.sqrt(2)


def test_statistics(done):
    workdir, results = done
    losses = {}
    for row in results["rows"]:
        values = [
            json.loads((workdir / row["name"] / f"seed_{seed}" / "run.json").read_text())["result"]
            for seed in SEEDS
        ]
        own = np.array([value["bits_per_byte"] for value in values])
        losses[row["name"]] = own
        assert len(set(own)) == len(SEEDS)
        assert row["bits_per_byte"] == {str(s): x for s, x in zip(SEEDS, own, strict=True)}
        difference = own - losses["mha"]
        expected = {
            "mean": own.mean(),
            "half_width": _half_width(own),
            "min": own.min(),
            "max": own.max(),
            "difference_mean": difference.mean(),
            "difference_half_width": _half_width(difference),
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_all_rows_but_the_first_have_half_its_cache(config):
    models = {name: row.apply(config.model) for name, row in claim_small.ROWS.items()}
    assert (models["gqa"].kv_layout.spec, models["gqa"].kv_heads) == ("mha", 1)
    first, *others = [costs.cache_bytes_per_token(model) for model in models.values()]
    assert others == [first / 2] * 5


def test_rows_hold_the_costs_of_their_models(done, config):
    for row in done[1]["rows"]:
        model = claim_small.ROWS[row["name"]].apply(config.model)
        assert row["parameters"] == costs.parameter_count(model)
        assert row["cache_bytes_per_token"] == costs.cache_bytes_per_token(model, "float32")


def test_finished_runs_are_skipped_and_rows_can_be_added(done, config, monkeypatch, capsys):
    workdir, results = done
    trained = []

    def train(config, workdir):
        trained.append(config.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.training, "train", train)
    assert reproduce.reproduce(config, workdir, NAMES, SEEDS) == results
    assert capsys.readouterr().out.count("(finished before)") == 4
    with pytest.raises(KeyboardInterrupt):
        reproduce.reproduce(config, workdir, [*NAMES, "cla"], SEEDS)
    assert trained == ["toy cla seed 3"]


def test_other_settings_are_refused(done, config):
    train = dataclasses.replace(config.train, steps=4)
    with pytest.raises(ValueError, match=r"train\.steps: 3 -> 4; set it back"):
        reproduce.reproduce(dataclasses.replace(config, train=train), done[0], NAMES, SEEDS)


def test_command_writes_the_table(done, config, comparison_text, tmp_path):
    workdir, results = done
    model = "num_layers=4 d_model=16 num_heads=2 d_ff=32 max_length=64 init_std=0.02"
    overrides = [f"--config.model.{field}" for field in model.split()]
    data = f"source={comparison_text} seq_len=32 batch_size=4 holdout_fraction=0.2"
    overrides += [f"--config.data.{field}" for field in data.split()]
    train = "steps=3 eval_every=0 eval_batches=1000"
    overrides += [f"--config.train.{field}" for field in train.split()]
    overrides += ["--config.optimizer.learning_rate=0.01", "--config.optimizer.warmup_steps=2"]
    overrides += ["--config.mesh.devices=1"]
    toy = tmp_path / "toy.py"
    toy.write_text(
        "from experiments.configs import claim_small\n"
        "import dataclasses\n"
        "def get_config():\n"
        "    return dataclasses.replace(claim_small.get_config(), name='toy')\n"
    )
    arguments = [
        f"--config={toy}",
        f"--workdir={workdir}",
        "--layouts=mha,fusedkv",
        "--seeds=3,5",
        f"--output={tmp_path / 'new' / 'table'}",
        *overrides,
    ]
    (out,) = commands.run_here("reproduce", arguments)
    written = json.loads((tmp_path / "new" / "table.json").read_text())
    assert written == json.loads(out.splitlines()[-1])
    assert written["rows"] == results["rows"]
    assert written["command"].startswith("python -m experiments.reproduce --config=")
    text = (tmp_path / "new" / "table.md").read_text()
    assert text in out
    fused = results["rows"][1]
    (line,) = [line for line in text.splitlines() if line.startswith("| fusedkv ")]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "fusedkv",
        f"{fused['parameters']:,}",
        "256",
        f"{fused['mean']:.4f} ± {fused['half_width']:.4f}",
        f"{fused['min']:.4f} to {fused['max']:.4f}",
        f"{fused['difference_mean']:+.4f} ± {fused['difference_half_width']:.4f}",
    ]


def test_any_layout_is_a_row(config):
    assert reproduce.read_names(["gqa", "0_0x3"], config.model) == ["gqa", "0_0x3"]
    made = reproduce.run_config(config, "0_0x3", 7)
    assert made.model == config.model.replace(layout="0_0x3") and made.train.seed == 7


def test_results_go_beside_the_runs_unless_told_otherwise():
    assert [str(path) for path in reproduce.places(None, None)] == [
        "runs/claim_small",
        "runs/claim_small/table",
    ]
    assert [str(path) for path in reproduce.places("a", "b/c")] == ["a", "b/c"]


def test_one_seed_has_no_spread(done, config, capsys):
    workdir, _ = done
    results = reproduce.reproduce(config, workdir, ["mha"], [3])
    assert results["rows"][0]["half_width"] is None
    results["command"] = "command"
    assert f"| {results['rows'][0]['mean']:.4f} |" in reproduce.markdown(results)


def test_mistakes(tmp_path):
    where = [f"--workdir={tmp_path}/runs", f"--output={tmp_path}/table"]
    commands.check_mistakes(
        "reproduce",
        [
            (
                [*where, "--layouts=mha,fusedk"],
                "--layouts=fusedk: unknown layout 'fusedk'; did you",
            ),
            ([*where, "--layouts=0_1"], "--layouts=0_1: layout '0_1' has 2 layers"),
            ([*where, "--layouts=mha,mha"], "--layouts names mha twice"),
            ([*where, "--seeds="], "--seeds= is empty; give it a value"),
            ([*where, "--seeds=0,one"], "--seeds=0,one; give numbers"),
            ([*where, "--seeds=1,1"], "--seeds names 1 twice"),
            ([*where, "--config.model.layout=mha"], "--config.model.layout is set by --layouts"),
            ([*where, "--config.train.seed=1"], "--config.train.seed is set by --seeds"),
            ([*where, "--config.train.steps=0"], "train.steps=0"),
            (
                [*where, "--config.model.num_heads=3", "--config.model.d_model=48"],
                "model.num_heads=3 must be a multiple of 2",
            ),
        ],
    )
