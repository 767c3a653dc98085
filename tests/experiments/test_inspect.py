"""`python -m experiments.inspect`: what a checkpoint holds, and which file is damaged."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from fusedkv_jax import costs, data
from fusedkv_jax.training import Checkpoints, make_optimizer
from fusedkv_jax.training.state import abstract_state
from tests.experiments.commands import check_mistakes

ROOT = pathlib.Path(__file__).parents[2]


def inspect(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "experiments.inspect", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def workdir(comparison_config, tmp_path_factory):
    """Two checkpoints, the second with a damaged file."""
    config, path = comparison_config, tmp_path_factory.mktemp("inspected")
    abstract = abstract_state(config.model, make_optimizer(config.optimizer, config.train.steps))
    state = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), abstract)
    with Checkpoints(path, keep=2) as checkpoints:
        for step in (6, 12):
            iterator = data.make_train_iterator(config.data)
            checkpoints.save(step, state, iterator, config, {"eval/loss": 1.5})
    damaged = next((path / "checkpoints/12/optimizer").rglob("*/d/*"))
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    return path, damaged


def test_shows_and_verifies(workdir, comparison_config):
    path, _ = workdir
    code, out, error = inspect(f"--workdir={path}", "--step=6")
    assert code == 0, error
    model = comparison_config.model
    for part in (
        f"toy, step 6 of {comparison_config.train.steps}",
        f"fusedkv, 4 layers, width 16, {costs.parameter_count(model):,} parameters",
        "eval/loss 1.5000",
        f"jax {jax.__version__}",
        "verified",
    ):
        assert part in out, (part, out)


def test_names_the_damaged_file_with_code_1(workdir):
    path, damaged = workdir
    code, out, _ = inspect(f"--workdir={path}")
    assert code == 1 and out.count("verified") == 1
    assert f"DAMAGED   checkpoint {path}/checkpoints/12" in out and damaged.name in out


def test_mistakes_are_one_line_with_code_2(monkeypatch):
    monkeypatch.chdir(ROOT)
    check_mistakes(
        "inspect",
        [
            ([], "--workdir is missing"),
            (["--workdir=dosc"], "no such file or folder 'dosc'; did you mean 'docs'?"),
            (["--workdir=docs"], "there is no checkpoint in docs"),
            (["tests"], "unexpected argument 'tests'; flags are written --name=value"),
        ],
    )
