"""A toy experiment that trains in a second, for the binaries that compare runs."""

import pathlib

import jax
import numpy as np
import pytest

from experiments.common import runs
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.data import DataConfig
from fusedkv_jax.sharding import MeshConfig
from fusedkv_jax.training import ExperimentConfig, OptimizerConfig, TrainConfig


@pytest.fixture(scope="session")
def comparison_text(tmp_path_factory) -> pathlib.Path:
    """40 short documents."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["def", "return", "cache", "größer", "(self):", "\n"]
    for i in range(40):
        text = " ".join(rng.choice(words, size=rng.integers(10, 60)))
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def comparison_config(comparison_text) -> ExperimentConfig:
    """A four-layer FusedKV model; its evaluation covers the whole held-out split."""
    return ExperimentConfig(
        name="toy",
        model=ModelConfig(
            vocab_size=258,
            num_layers=4,
            d_model=16,
            num_heads=2,
            d_ff=32,
            max_length=64,
            layout="fusedkv",
        ),
        data=DataConfig(
            source=str(comparison_text), seq_len=32, batch_size=4, holdout_fraction=0.2
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(steps=12, log_every=4, eval_every=6, eval_batches=1000),
        mesh=MeshConfig(devices=1),
    )


@pytest.fixture(scope="session")
def finished_run(comparison_config, tmp_path_factory) -> pathlib.Path:
    """Directory of the toy experiment's run; not to be written to."""
    return runs.complete(comparison_config, tmp_path_factory.mktemp("finished")).workdir


@pytest.fixture
def share_compiled_programs(monkeypatch):
    """Programs that the test starts use the tests' compilation cache."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
