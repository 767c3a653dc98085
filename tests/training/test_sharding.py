"""Training on meshes of 8 virtual devices gives what one device gives.

FUSEDKV_ALL_MESHES=1 trains every layout on every mesh.
"""

import dataclasses
import functools
import os

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from fusedkv_jax import data
from fusedkv_jax.config import MLAConfig, ModelConfig
from fusedkv_jax.sharding import (
    MeshConfig,
    MeshError,
    check_batch,
    make_mesh,
    parameter_shardings,
    put_batch,
    spec,
)
from fusedkv_jax.training import (
    Checkpoints,
    TrainProgram,
    create_state,
    learning_rate_schedule,
    make_optimizer,
    make_train_step,
)
from fusedkv_jax.training.evaluation import make_eval_step
from fusedkv_jax.training.state import abstract_model, abstract_state
from fusedkv_jax.training.step import BATCH_KEYS
from tests.training.golden import OPTIMIZER, STEPS, batches, small_config

PRODUCT = MeshConfig(data=1, fsdp=2, context=2, tensor=2)
MESHES = {
    "data": MeshConfig(),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(tensor=4),
    "context": MeshConfig(context=4),
    "data x fsdp x tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp x context x tensor": PRODUCT,
}
MLA = MLAConfig(q_lora_rank=0, kv_lora_rank=16, nope_dim=8, rope_dim=8, v_dim=8)


def _losses(config: ModelConfig, mesh_config: MeshConfig, steps: int) -> list[float]:
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    graphdef, _ = abstract_model(config)
    step = make_train_step(graphdef, optimizer, learning_rate_schedule(OPTIMIZER, STEPS))
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        state = create_state(config, optimizer, 0, mesh)
        shardings = (parameter_shardings(state, mesh), None)
        compiled = jax.jit(step, donate_argnums=0, out_shardings=shardings)
        losses = []
        for batch in batches(steps):
            state, metrics = compiled(state, put_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
    return losses


LAYOUTS = {
    **{layout: small_config(layout) for layout in ("mha", "cla", "yoco", "fusedkv_lite")},
    "fusedkv": small_config("fusedkv"),
    "mla": small_config("mha", mla=MLA, num_kv_heads=None),
}


# One layout on every mesh and every layout on one mesh, or all pairs.
PAIRS = [
    (layout, mesh)
    for layout in LAYOUTS
    for mesh in MESHES
    if "FUSEDKV_ALL_MESHES" in os.environ or layout == "fusedkv" or MESHES[mesh] is PRODUCT
]


@functools.cache
def _losses_of_one_device(layout: str, steps: int) -> list[float]:
    return _losses(LAYOUTS[layout], MeshConfig(devices=1), steps)


def _assert_equal(layout: str, mesh: MeshConfig, steps: int) -> None:
    wanted = _losses_of_one_device(layout, steps)
    assert wanted[-1] < wanted[0] - 0.1 * (steps == STEPS)
    np.testing.assert_allclose(_losses(LAYOUTS[layout], mesh, steps), wanted, rtol=1e-5)


def test_a_product_of_all_parallelisms_gives_the_same_losses():
    _assert_equal("fusedkv", PRODUCT, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "mesh"), PAIRS)
def test_every_parallelism_gives_the_same_losses_for_every_layout(layout, mesh):
    _assert_equal(layout, MESHES[mesh], STEPS)


def test_explicit_axes_change_nothing(toy):
    """A whole run's program, its evaluation and a plain call of the model."""
    results = []
    for axis_types in ("auto", "explicit"):
        mesh = make_mesh(dataclasses.replace(PRODUCT, axis_types=axis_types))
        config = dataclasses.replace(toy, data=dataclasses.replace(toy.data, batch_size=8))
        with jax.set_mesh(mesh):
            program = TrainProgram(config, mesh)
            state, batches = program.create(), data.make_train_iterator(config.data)
            batch = put_batch({name: next(batches)[name] for name in BATCH_KEYS}, mesh)
            loss, count = make_eval_step(program.graphdef)(state.params, batch)
            logits = nnx.merge(program.graphdef, state.params)(
                batch["tokens"], batch["segment_ids"], batch["positions"]
            )
            state, metrics = program.lower().compile()(state, batch)
            assert metrics["loss"].sharding.mesh.axis_types[0].name.lower() == axis_types
        results.append(jax.device_get((loss, count, logits, metrics, state.params)))
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(x, y)


def test_every_large_parameter_is_split_and_optimizer_state_with_it():
    config = small_config("fusedkv")
    mesh = make_mesh(PRODUCT)
    state = create_state(config, make_optimizer(OPTIMIZER, STEPS), 0, mesh)
    whole = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if leaf.size >= 1024 and leaf.sharding.is_fully_replicated:
            whole.append(jax.tree_util.keystr(path))
    assert not whole
    kept = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert kept < 0.16 * sum(x.nbytes for x in jax.tree.leaves(state))  # of 8 devices


def test_initial_parameters_do_not_depend_on_the_mesh():
    config, optimizer = small_config("fusedkv"), make_optimizer(OPTIMIZER, STEPS)
    one = create_state(config, optimizer, 3)
    split = create_state(config, optimizer, 3, make_mesh(PRODUCT))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(split), strict=True):
        # The draws are the same; XLA may round the last bit of one in a shard of another shape.
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_a_checkpoint_of_one_mesh_restores_bit_equal_on_another(toy, tmp_path):
    optimizer = make_optimizer(toy.optimizer, toy.train.steps)
    state = create_state(toy.model, optimizer, 0, make_mesh(PRODUCT))
    iterator = data.make_train_iterator(toy.data)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, state, iterator, toy)
        checkpoints.wait()
        for mesh in (make_mesh(MeshConfig(fsdp=8)), make_mesh(MeshConfig(devices=1))):
            abstract = abstract_state(toy.model, optimizer, mesh)
            restored = checkpoints.restore(abstract, iterator, toy)
            assert restored is not None
            for x, y in zip(jax.tree.leaves(restored[0]), jax.tree.leaves(state), strict=True):
                np.testing.assert_array_equal(x, y)
                assert x.sharding.mesh.shape == mesh.shape


def test_specs_leave_whole_what_does_not_divide():
    mesh = make_mesh(PRODUCT)
    assert spec(("batch", "sequence", None), (8, 32, 7), mesh) == P("fsdp", "context", None)
    assert spec(("width", "kv_heads", None), (32, 1, 8), mesh) == P(("fsdp", "context"), None, None)
    assert spec(("width", "heads"), (6, 4), mesh) == P("fsdp", "tensor")
    assert spec(("vocabulary", "width"), (63, 3), mesh) == P(None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": 3}, "mesh data=3 x fsdp=1 x context=1 x tensor=1 has 3 places for 8 devices"),
        ({"fsdp": 3}, "3 does not divide the 8 devices"),
        ({"data": -1, "fsdp": -1}, "only one axis of the mesh can be -1"),
        ({"tensor": 0}, "mesh.tensor=0 must be 1 or more"),
        ({"devices": 9}, "mesh.devices=9, and there are 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_clear_line(settings, message):
    with pytest.raises(MeshError) as caught:
        make_mesh(MeshConfig(**settings))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("without_type_checks")
def test_unknown_axis_types_are_refused():
    with pytest.raises(MeshError, match="mesh.axis_types='manual'; choose auto, explicit"):
        MeshConfig(axis_types="manual")  # pyright: ignore


def test_a_batch_that_does_not_divide_says_what_would():
    mesh = make_mesh(MeshConfig(fsdp=2, context=2))
    with pytest.raises(MeshError, match="batch_size=6 does not divide .* use a multiple of 8"):
        check_batch(mesh, 6, 32, microbatches=2)
    with pytest.raises(MeshError, match="seq_len=33 does not divide over context=2"):
        check_batch(mesh, 8, 33)
