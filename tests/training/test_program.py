"""The compiled step of a run: what its options change, and what they must not."""

import dataclasses

import jax
import numpy as np
import pytest

from fusedkv_jax import data
from fusedkv_jax.sharding import MeshConfig, MeshError, make_mesh, put_batch
from fusedkv_jax.training import Checkpoints, TrainProgram
from fusedkv_jax.training.step import BATCH_KEYS

MESHES = {"one device": MeshConfig(devices=1), "fsdp": MeshConfig(data=1, fsdp=4, devices=4)}


def _changed(toy, **parts):
    return dataclasses.replace(
        toy,
        **{
            name: dataclasses.replace(getattr(toy, name), **fields)
            for name, fields in parts.items()
        },
    )


def _run(config, mesh_config, steps=5):
    """States and losses of a few steps."""
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        program = TrainProgram(config, mesh)
        step, state = program.lower().compile(), program.create()
        batches, losses = data.make_train_iterator(config.data), []
        for _ in range(steps):
            batch = next(batches)
            state, metrics = step(state, put_batch({k: batch[k] for k in BATCH_KEYS}, mesh))
            losses.append(float(metrics["loss"]))
    return state, losses


CRASHES = jax.__version_info__ >= (0, 11)  # XLA for several CPU devices, while compiling
on_several = pytest.mark.skipif(CRASHES, reason="jax does not compile it; see the next test")


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("one device", marks=() if CRASHES else pytest.mark.slow),
        pytest.param("fsdp", marks=on_several),
    ],
)
def test_optimizer_state_in_host_memory_changes_no_bit(toy, mesh):
    state, losses = _run(toy, MESHES[mesh])
    offloaded, same = _run(_changed(toy, optimizer={"offload": True}), MESHES[mesh])
    assert same == losses
    for x, y in zip(jax.tree.leaves(offloaded), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x, y)
    kinds = {
        leaf.sharding.memory_kind for leaf in jax.tree.leaves(offloaded.opt_state) if leaf.ndim
    }
    assert kinds == {"pinned_host"}
    assert "pinned_host" not in {
        leaf.sharding.memory_kind for leaf in jax.tree.leaves(offloaded.params)
    }


@pytest.mark.skipif(not CRASHES, reason="this jax compiles it")
def test_host_memory_of_several_cpu_devices_is_refused_where_it_would_crash(toy):
    offloading = _changed(toy, optimizer={"offload": True})
    with pytest.raises(MeshError, match="offload=True on 4 CPU devices .* use one device, an acc"):
        _run(offloading, MESHES["fsdp"])


def test_offloaded_state_is_saved_and_restored_where_it_was(toy, tmp_path):
    config = _changed(toy, optimizer={"offload": True})
    state, _ = _run(config, MeshConfig(devices=1), steps=2)
    iterator = data.make_train_iterator(config.data)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, state, iterator, config)
        checkpoints.wait()
        for offload, kind in ((True, "pinned_host"), (False, "device")):
            changed = _changed(toy, optimizer={"offload": offload})
            program = TrainProgram(changed, make_mesh(MeshConfig(devices=1)))
            restored = checkpoints.restore(program.state, iterator, changed)
            assert restored is not None
            for x, y in zip(jax.tree.leaves(restored[0]), jax.tree.leaves(state), strict=True):
                np.testing.assert_array_equal(x, y)
            moments = [x for x in jax.tree.leaves(restored[0].opt_state) if x.ndim]
            assert {x.sharding.memory_kind for x in moments} == {kind}


def test_the_loss_in_chunks_trains_alike(toy):
    wide = _changed(toy, model={"vocab_size": 8192}, train={"logits_mib": 64})  # 4 MiB of logits
    chunked = _changed(wide, train={"logits_mib": 1})
    wanted = _run(wide, MeshConfig(devices=1))[1]
    np.testing.assert_allclose(_run(chunked, MeshConfig(devices=1))[1], wanted, rtol=1e-5)


@pytest.mark.parametrize("mesh_config", [*MESHES.values(), MeshConfig(axis_types="explicit")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_training_starts_from_stays(toy, toy_params, mesh_config, dtype):
    config = _changed(toy, data={"batch_size": 8}, model={"param_dtype": dtype})
    given = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.devices()[0]), toy_params)
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        params = TrainProgram(config, mesh).create(given).params
        kept = jax.tree.map(np.asarray, given)
        jax.tree.map(lambda leaf: leaf.delete(), params)  # as a step does that is given them
    for leaf, expected in zip(*map(jax.tree.leaves, (given, kept)), strict=True):
        np.testing.assert_array_equal(leaf, expected)
