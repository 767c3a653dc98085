"""Low-rank adaptation: what is trained, what stays, and what a reader of the run gets."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fusedkv_jax import data
from fusedkv_jax.model import Decoder
from fusedkv_jax.model.projection import LowRank, project
from fusedkv_jax.sharding import MeshConfig, make_mesh
from fusedkv_jax.training import CheckpointError, TrainProgram, evaluate, load_model, train
from fusedkv_jax.training.checkpointing.checkpoints import checkpoint_directory
from fusedkv_jax.training.evaluation import make_eval_step
from fusedkv_jax.training.trainable import lora_of

RANK, ALPHA = 3, 6.0


@pytest.mark.parametrize("inputs, outputs", [((8,), (2, 4)), ((2, 4), (8,))])
def test_a_change_is_added_without_the_sum(inputs, outputs):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, base = draw(5, *inputs), draw(*inputs, *outputs)
    a, b = draw(*inputs, RANK), draw(RANK, *outputs)
    axes = len(inputs)

    def apart(a, b):
        return project(x, LowRank(base, a, b, 2.0), axes)

    def together(a, b):
        return project(x, base + 2 * jnp.tensordot(a, b, 1), axes)

    np.testing.assert_allclose(apart(a, b), together(a, b), rtol=1e-4, atol=1e-4)

    def gradient(function):
        return jax.grad(lambda a, b: jnp.sin(function(a, b)).sum(), (0, 1))(a, b)

    for mine, other in zip(gradient(apart), gradient(together), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-3)


def test_thin_matrices_are_trained_and_added_where_the_run_is_read(toy, tmp_path):
    config = dataclasses.replace(
        toy,
        model=toy.model.replace(init_std=0.25),
        optimizer=dataclasses.replace(toy.optimizer, learning_rate=0.03),
        train=dataclasses.replace(
            toy.train,
            steps=6,
            trainable="changed",
            lora_rank=RANK,
            lora_alpha=ALPHA,
            eval_batches=2,
            checkpoint_every=3,
            log_every=1,
        ),
    )
    start = Decoder(config.model, rngs=nnx.Rngs(3))
    train(config, tmp_path, initial=lambda: start)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.05

    model, found, step = load_model(tmp_path)
    assert (step, found.train.lora_rank, model.config) == (6, 0, config.model)
    graphdef, params = nnx.split(model, nnx.Param)
    read = evaluate(make_eval_step(graphdef), params, data.make_eval_batches(found.data, 2))
    evaluated = [line["eval/loss"] for line in lines if "eval/loss" in line]
    np.testing.assert_allclose(read.metrics["loss"], evaluated[-1], rtol=1e-5)

    before, after = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (start, model))
    changed = {path for path in after if (after[path][...] != before[path][...]).any()}
    # FusedKV's upper half: two layers without keys and values, in the second run.
    names = {"q_proj", "o_proj", "gate", "up", "down"}
    assert {path[-1] for path in changed if path[0] == "runs"} == names
    assert {path[:2] for path in changed if path[0] == "runs"} == {("runs", 1)}
    assert {path for path in changed if path[0] != "runs"} == {
        path for path in after if path[0] == "mixing"
    }
    for path in changed:
        if path[0] == "runs":
            change = np.asarray(after[path][...] - before[path][...], np.float64)
            stack = change.shape[0]
            inputs = 2 if path[-1] == "o_proj" else 1
            sizes = np.prod(change.shape[1 : 1 + inputs]), -1
            for matrix in change.reshape(stack, *map(int, sizes)):
                values = np.linalg.svd(matrix, compute_uv=False)
                assert values[RANK - 1] > 1e-3 * values[0] > 10 * values[RANK]

    # Going on from the middle gives the same, bit for bit; at another scale it would be another
    # model.
    for path in checkpoint_directory(tmp_path).iterdir():
        if path.name == "6":
            path.rename(tmp_path / "aside")
    scaled = dataclasses.replace(config.train, lora_alpha=5.0)
    with pytest.raises(CheckpointError, match=r"train.lora_alpha: .* -> 5.0; set it back"):
        train(dataclasses.replace(config, train=scaled), tmp_path)
    train(config, tmp_path, initial=lambda: pytest.fail("it goes on"))
    again = nnx.state(load_model(tmp_path)[0], nnx.Param)
    for path, variable in nnx.to_flat_state(again):
        np.testing.assert_array_equal(variable[...], after[path][...])


def test_the_optimizer_knows_nothing_else(with_train):
    config = with_train(lora_rank=RANK)
    mesh = make_mesh(MeshConfig(devices=1))
    program = TrainProgram(config, mesh)
    lora = lora_of(config)
    thin, rest = nnx.split_state(program.state.params, nnx.LoRAParam, ...)
    mixing = [leaf for path, leaf in nnx.to_flat_state(rest) if path[0] == "mixing"]
    trained = sum(leaf.size for leaf in [*jax.tree.leaves(thin), *jax.tree.leaves(mixing)])
    counters = [leaf for leaf in jax.tree.leaves(program.state.opt_state) if not leaf.ndim]
    held = sum(leaf.size for leaf in jax.tree.leaves(program.state.opt_state)) - len(counters)
    assert held == 2 * trained < 0.5 * sum(leaf.size for leaf in jax.tree.leaves(rest))
    # Every matrix of every layer but those that read no hidden state.
    assert lora is not None and len(jax.tree.leaves(thin)) == 2 * (7 + 5)
    with pytest.raises(ValueError, match="train.lora_rank=3 adapts a trained model; start from"):
        program.create()
