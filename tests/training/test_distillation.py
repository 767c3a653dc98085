"""Distillation from a teacher, against its definition, and through the training step."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fusedkv_jax.model import Decoder
from fusedkv_jax.sharding import MeshConfig, make_mesh, put_batch
from fusedkv_jax.training import DistillationConfig, TrainProgram, train
from fusedkv_jax.training.distillation import distillation_loss
from fusedkv_jax.training.loss import batch_loss


@pytest.fixture(scope="module")
def pair(toy):
    """A model and the teacher that it was made from, of another layout."""
    model, teacher = (
        Decoder(toy.model.replace(layout=layout), rngs=nnx.Rngs(seed))
        for seed, layout in enumerate(("fusedkv", "mha"))
    )
    return model, teacher


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    return {
        "tokens": jnp.asarray(rng.integers(0, 258, (4, 8)), jnp.int32),
        "targets": jnp.asarray(rng.integers(0, 258, (4, 8)), jnp.int32),
        "segment_ids": jnp.zeros((4, 8), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (4, 8)),
        "loss_mask": jnp.ones((4, 8)).at[-1, 2:].set(0),
    }


def test_losses_are_those_of_the_definition(pair, batch):
    model, teacher = pair
    counted = np.asarray(batch["loss_mask"]) != 0
    given = batch["tokens"], batch["segment_ids"], batch["positions"]
    logs = [jax.nn.log_softmax(one(*given) / 2.0) for one in pair]
    divergence = 4 * (np.exp(logs[1]) * (logs[1] - logs[0])).sum(-1)[counted].sum()
    x, y = (np.asarray(one.layer_outputs(*given)) for one in pair)
    distance = (((x - y) ** 2).sum(-1) / (y**2).sum(-1)).mean(0)[counted].sum()
    text = batch_loss(*nnx.split(model, nnx.Param), batch)[0]
    config = DistillationConfig(logits=0.5, hidden=3.0, text=0.25, temperature=2.0)
    for logits_mib in (512, 0.01):  # whole, and in chunks that do not divide the tokens
        total, count = distillation_loss(model, teacher, batch, config, logits_mib)
        assert count == 26
        np.testing.assert_allclose(total, 0.5 * divergence + 3 * distance + 0.25 * text, rtol=1e-4)
    same, _ = distillation_loss(teacher, teacher, batch, dataclasses.replace(config, text=0.0))
    assert abs(same) < 1e-4


def test_chunks_change_no_gradient(pair, batch):
    graphdef, params = nnx.split(pair[0], nnx.Param)

    def gradient(logits_mib):
        def loss(params):
            model = nnx.merge(graphdef, params)
            config = DistillationConfig(logits=1.0)
            return distillation_loss(model, pair[1], batch, config, logits_mib)[0]

        return jax.grad(loss)(params)

    for one, other in zip(*map(jax.tree.leaves, (gradient(512), gradient(0.01))), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_padding_that_a_teacher_embeds_as_zeros_gives_no_gradient(pair, batch):
    model, teacher = (nnx.clone(one) for one in pair)
    for one in (model, teacher):  # as PyTorch leaves the row of a padding token
        one.embedding[...] = one.embedding[...].at[0].set(0)
    padding = batch["loss_mask"] == 0
    padded = batch | {
        "tokens": jnp.where(padding, 0, jnp.maximum(batch["tokens"], 1)),
        "segment_ids": jnp.where(padding, -1, 1),
    }
    graphdef, params = nnx.split(model, nnx.Param)

    def gradient(padded):
        def loss(params):
            config = DistillationConfig(hidden=1.0)
            return distillation_loss(nnx.merge(graphdef, params), teacher, padded, config)[0]

        return jax.tree.leaves(jax.grad(loss)(params))

    other = padded | {"tokens": jnp.where(padding, 5, padded["tokens"])}
    for one, another in zip(gradient(padded), gradient(other), strict=True):
        np.testing.assert_allclose(one, another, atol=1e-5)


def test_training_brings_a_model_nearer_to_its_teacher(toy, pair, tmp_path):
    config = dataclasses.replace(
        toy,
        distillation=DistillationConfig(logits=1.0, hidden=1.0),
        train=dataclasses.replace(toy.train, steps=12, grad_accumulation=2, log_every=1),
    )
    result = train(config, tmp_path, teacher=pair[1])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert result.step == 12
    losses = [json.loads(line)["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_a_mesh_gives_what_one_device_gives(toy, pair):
    """Of changes of low rank too, which every device has whole."""
    model, teacher = pair
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 258, (2, 4, 32), np.int32)
    batch = {
        "tokens": ids[0],
        "targets": ids[1],
        "segment_ids": np.zeros((4, 32), np.int32),
        "positions": np.broadcast_to(np.arange(32, dtype=np.int32), (4, 32)),
        "loss_mask": np.ones((4, 32), np.float32),
    }
    losses = []
    for sizes in (MeshConfig(devices=1), MeshConfig(data=2, fsdp=2, tensor=2)):
        config = dataclasses.replace(
            toy,
            mesh=sizes,
            distillation=DistillationConfig(logits=1.0, hidden=1.0),
            train=dataclasses.replace(toy.train, lora_rank=2),
        )
        mesh = make_mesh(sizes)
        program = TrainProgram(config, mesh, teacher.config)
        with jax.set_mesh(mesh):
            step, state = program.lower().compile(), program.create(nnx.state(model, nnx.Param))
            place = lambda leaf, like: jax.device_put(leaf, like.sharding)  # noqa: E731
            constants = jax.tree.map(place, (nnx.state(teacher, nnx.Param),), program.constants)
            found = []
            for _ in range(3):
                state, metrics = step(state, put_batch(batch, mesh), *constants)
                found.append(float(metrics["loss"]))
        losses.append(found)
    assert losses[0][2] < losses[0][0] - 1e-3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_what_does_not_fit_is_refused(toy, pair):
    mesh = make_mesh(MeshConfig(devices=1))
    learns = dataclasses.replace(toy, distillation=DistillationConfig(hidden=1.0))
    for config, teacher, message in (
        (learns, None, "distillation needs a teacher"),
        (toy, toy.model, "a teacher is given, but"),
        (learns, toy.model.replace(vocab_size=300), "the teacher has vocab_size=300"),
        (learns, toy.model.replace(num_layers=2, layout="mha"), "num_layers=2.*hidden=0"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainProgram(config, mesh, teacher)
    for settings, message in (
        (dict(logits=-1.0), "distillation.logits=-1.0; use 0 or more"),
        (dict(text=1.0), "goes with distillation.logits"),
        (dict(logits=1.0, temperature=0.0), "use more than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationConfig(**settings)
    early = dataclasses.replace(toy.early_exit, loss_scale=1.0)
    with pytest.raises(ValueError, match="two objectives"):
        dataclasses.replace(learns, early_exit=early)
