"""The suite `generation`: what early exit, drafts, compression and small storage types give."""

import atexit
import dataclasses
import functools
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from experiments.benchmarks import cpu, generation_quality, generation_speed, programs, speed
from experiments.benchmarks.report import Measurement
from experiments.common import runs
from experiments.configs import demo
from fusedkv_jax.compression import DoubleSparsity, SnapKV
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.data import DataConfig
from fusedkv_jax.training import ExperimentConfig, TrainConfig
from fusedkv_jax.training.early_exit import EarlyExitConfig

WORKDIR = pathlib.Path("runs/generation")
# Long caches: 268 MB of keys and values at 16,384 tokens, next to 26 MB of parameters.
LONG: dict[str, Any] = dict(
    vocab_size=1024,
    num_layers=8,
    d_model=256,
    num_heads=4,
    d_ff=704,
    max_length=32_768,
)


def early_exit_config() -> ExperimentConfig:
    """The demo with an early-exit loss: a model that can draft for itself.

    All exits have a share of every step's loss. By LayerSkip's cumulative weights the first layer
    has none, which is the exit that drafts cheapest.
    """
    early_exit = EarlyExitConfig(loss_scale=0.3, weights="uniform", curriculum="none")
    return dataclasses.replace(demo.get_config(), name="demo early exit", early_exit=early_exit)


def toy_config(folder: pathlib.Path) -> ExperimentConfig:
    """The same at a size that trains in seconds, on text that it writes itself."""
    for number in range(12):
        text = f"def function_{number}(self):\n    return {number}\n" * 4
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    model = ModelConfig(**(cpu.TOY | {"vocab_size": 258, "num_kv_heads": 4, "layout": "fusedkv"}))
    return ExperimentConfig(
        name="toy",
        model=model,
        data=DataConfig(source=str(folder), seq_len=32, batch_size=2, holdout_fraction=0.5),
        train=TrainConfig(steps=2, eval_batches=1),
        early_exit=EarlyExitConfig(loss_scale=1.0),
    )


def measurements(
    *, quick: bool, rounds: int, torch_compile: bool
) -> dict[str, Callable[[], Measurement]]:
    """The measurements of the suite by name.

    Args:
      quick: toy sizes, whose numbers say only that the measurement works.
      rounds: turns of each contestant.
      torch_compile: let a version of transformers compiled by PyTorch compete in throughput.
    """
    config = ModelConfig(**(cpu.TOY if quick else cpu.GEOMETRY))
    fused = config.replace(num_kv_heads=config.num_heads, layout="fusedkv")
    long = ModelConfig(**(cpu.TOY if quick else LONG))
    budget = 8 if quick else 1024
    return {
        "throughput": lambda: speed.measure_decoding(
            config,
            batches=(2,) if quick else (8,),
            prompt=8 if quick else 128,
            new_tokens=4 if quick else 128,
            rounds=rounds,
            torch_compile=torch_compile,
        ),
        "first_token": lambda: generation_speed.measure_first_token(
            fused, prompt=32 if quick else 8192, rounds=rounds
        ),
        "speculation": lambda: generation_speed.measure_speculation(
            trained(quick),
            prompt=16 if quick else 64,
            new_tokens=8 if quick else 192,
            rounds=rounds,
        ),
        "long_cache": lambda: generation_speed.measure_long_cache(
            long,
            {
                "snapkv": SnapKV(budget=budget, window=4 if quick else 32),
                "double_sparsity": DoubleSparsity(budget=budget // 4),
            },
            tokens=32 if quick else 16_384,
            steps=2 if quick else 32,
            rounds=rounds,
        ),
        "storage": lambda: generation_quality.measure_storage(
            trained(quick), texts=2 if quick else 32
        ),
        "recompilation": lambda: programs.measure_recompilation(
            ModelConfig(**cpu.TOY).replace(layout="fusedkv"),
            prompts=12 if quick else 200,
            batch=2 if quick else 8,
            longest=32 if quick else 64,
        ),
    }


@functools.cache
def trained(quick: bool) -> runs.FinishedRun:
    """The model of `early_exit_config`, trained in `WORKDIR` if it is not there yet."""
    if not quick:
        return runs.complete(early_exit_config(), WORKDIR / "demo_early_exit")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="fusedkv_jax_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "text").mkdir()
    return runs.complete(toy_config(folder / "text"), folder / "run")
