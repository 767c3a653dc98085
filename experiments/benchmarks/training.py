"""The suite `training`: what checkpoints cost a run, and what a loss in chunks does."""

import dataclasses
import functools
import itertools
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from experiments.benchmarks.generation import toy_config
from experiments.benchmarks.report import Measurement, Target
from experiments.benchmarks.turns import take_turns
from fusedkv_jax import data, training
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.sharding import MeshConfig, make_mesh, put_batch
from fusedkv_jax.training import ExperimentConfig, TrainProgram
from fusedkv_jax.training.checkpointing import manifest
from fusedkv_jax.training.loss import head_cross_entropy, sum_cross_entropy
from fusedkv_jax.training.step import BATCH_KEYS

INTERVAL = 100  # steps between checkpoints
# 5.3 million parameters, so 64 MB of parameters and optimizer state.
SAVED = {
    "max_length": 128,
    "d_model": 256,
    "num_layers": 6,
    "num_heads": 4,
    "num_kv_heads": 4,
    "d_ff": 704,
}
# Of parameters; the moments of a new state are zeros, which are stored in no space.
VERIFIED_BYTES = 1e9


def measurements(
    *, quick: bool, rounds: int, torch_compile: bool
) -> dict[str, Callable[[], Measurement]]:
    """The measurements of the suite by name; arguments as for the other suites."""
    del torch_compile
    size = {"rows": 2, "length": 64, "width": 64, "vocabulary": 512}
    if not quick:
        size = {"rows": 4, "length": 512, "width": 256, "vocabulary": 32_768}
    return {
        "saving": lambda: measure_saving(rounds, {} if quick else SAVED, 3 if quick else INTERVAL),
        "verification": lambda: measure_verification(rounds, 1e6 if quick else VERIFIED_BYTES),
        "loss": lambda: measure_loss(rounds, **size),
    }


def measure_saving(rounds: int, model: dict[str, int], interval: int) -> Measurement:
    """Mean time of a step over intervals with and without an asynchronous save in them."""
    with tempfile.TemporaryDirectory() as folder:
        config = toy_config(pathlib.Path(folder))
        mesh = make_mesh(MeshConfig(devices=1))
        changed = ModelConfig.from_dict(config.model.to_dict() | model)
        program = TrainProgram(_with_batches(config, changed, quick=not model), mesh)
        batches = data.make_train_iterator(program.config.data)
        batch = put_batch({name: next(batches)[name] for name in BATCH_KEYS}, mesh)
        with (
            jax.set_mesh(mesh),
            training.Checkpoints(folder, keep=1, report=_refuse) as checkpoints,
        ):
            step, state = program.lower().compile(), program.create()
            numbers = itertools.count(1)

            def run(save: bool) -> None:
                nonlocal state
                for i in range(interval):
                    state, metrics = step(state, batch)
                    metrics["loss"].block_until_ready()
                    if save and i == 0:
                        checkpoints.save(next(numbers), state, batches, program.config)

            with_saves, without = functools.partial(run, True), functools.partial(run, False)
            seconds = take_turns({"without saving": without, "one save": with_saves}, rounds)
            checkpoints.wait()
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    overhead = seconds["one save"] / seconds["without saving"] - 1
    return Measurement(
        "Saving: seconds of a training step, with an asynchronous checkpoint in each interval",
        {"interval": interval, "state_mb": round(size / 1e6, 1)},
        [{"": name, "ms a step": 1e3 * value / interval} for name, value in seconds.items()],
        [Target("added by saving", overhead, "<=", 0.05)],
    )


def measure_verification(rounds: int, size: float) -> Measurement:
    """Bytes per second of SHA-256 over a checkpoint's files, and its share of a restore."""
    mesh = make_mesh(MeshConfig(devices=1))
    with tempfile.TemporaryDirectory() as folder:
        config = toy_config(pathlib.Path(folder))
        width = max(16, int((size / 192) ** 0.5) // 16 * 16)  # 4 layers of 12 D^2 float32
        geometry = {
            "max_length": 128,
            "num_layers": 4,
            "d_model": width,
            "d_ff": 8 * width // 3,
            "head_dim": 16,
        }
        heads = {"num_heads": max(1, width // 16), "num_kv_heads": None}
        model = ModelConfig.from_dict(config.model.to_dict() | geometry | heads)
        program = TrainProgram(_with_batches(config, model, quick=True), mesh)
        iterator = data.make_train_iterator(program.config.data)
        with (
            jax.set_mesh(mesh),
            training.Checkpoints(folder, keep=1, report=_refuse) as checkpoints,
        ):
            checkpoints.save(1, program.create(), iterator, program.config)
            checkpoints.wait()
            path = training.checkpoint_directory(folder) / "1"
            nbytes = manifest.read(path).nbytes

            def restore() -> None:
                found = checkpoints.restore(program.state, iterator, program.config)
                assert found is not None
                jax.block_until_ready(found[0])

            verify = functools.partial(manifest.verify, path)
            start = time.process_time()
            verify()
            cores = time.process_time() - start
            seconds = take_turns({"verify": verify, "verify and restore": restore}, rounds)
    share = seconds["verify"] / seconds["verify and restore"]
    rate = nbytes / cores / 1e9
    return Measurement(
        "Verification: a checkpoint's files against their SHA-256, when it is restored",
        {"gigabytes": round(nbytes / 1e9, 3), "share_of_restore": round(share, 3)},
        [{"": name, "seconds": value} for name, value in seconds.items()],
        [Target("GB a second and core", rate, ">=", 1.0)],
    )


def measure_loss(
    rounds: int, *, rows: int, length: int, width: int, vocabulary: int
) -> Measurement:
    """Forward and backward of the output head: chunks of tokens against whole logits."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, length, width)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((width, vocabulary)), jnp.float32) / width**0.5
    targets = jnp.asarray(rng.integers(0, vocabulary, (rows, length)), jnp.int32)
    mask = jnp.ones((rows, length))

    def whole(x: jax.Array, head: jax.Array) -> jax.Array:
        return sum_cross_entropy(jnp.einsum("btd,dv->btv", x, head), targets, mask)[0]

    def chunked(x: jax.Array, head: jax.Array) -> jax.Array:
        return head_cross_entropy(x, head, targets, mask)[0]

    compiled, temporary = {}, {}
    for name, loss in {"whole logits": whole, "in chunks": chunked}.items():
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, head).compile()
        memory = program.memory_analysis()
        assert memory is not None
        temporary[name] = memory.temp_size_in_bytes
        compiled[name] = functools.partial(_call, program, x, head)
    seconds = take_turns(compiled, rounds)
    chunks, plain = (seconds[name] for name in ("in chunks", "whole logits"))
    return Measurement(
        "Output head: loss and its gradients, in the chunks that training takes here",
        {"tokens": rows * length, "width": width, "vocabulary": vocabulary},
        [
            {"": name, "ms": 1e3 * seconds[name], "temporary MiB": temporary[name] / 2**20}
            for name in seconds
        ],
        [Target("times the time of whole logits", chunks / plain, "<=", 1.1)],
    )


def _with_batches(config: ExperimentConfig, model: ModelConfig, quick: bool) -> ExperimentConfig:
    rows, length = (2, 32) if quick else (4, 128)
    batches = dataclasses.replace(config.data, batch_size=rows, seq_len=length)
    return dataclasses.replace(config, model=model, data=batches)


def _call(program: Callable[..., PyTree], *arguments: jax.Array) -> None:
    jax.block_until_ready(program(*arguments))


def _refuse(line: str) -> None:
    raise RuntimeError(line)
