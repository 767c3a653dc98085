"""Training of what a conversion changed: the rest keeps its values and has no optimizer state."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from fusedkv_jax import data
from fusedkv_jax.sharding import MeshConfig, make_mesh, put_batch
from fusedkv_jax.training import Checkpoints, TrainProgram
from fusedkv_jax.training.step import BATCH_KEYS
from fusedkv_jax.training.trainable import chosen_parameters


def test_only_readers_of_others_change_and_have_state(toy, tmp_path):
    config = dataclasses.replace(
        toy, train=dataclasses.replace(toy.train, trainable="changed", grad_accumulation=2)
    )
    mesh = make_mesh(MeshConfig(devices=1))
    with jax.set_mesh(mesh):
        program = TrainProgram(config, mesh)
        compiled, state = program.lower().compile(), program.create()
        before = _values(state)
        iterator = data.make_train_iterator(config.data)

        def step(state, iterator):
            batch = next(iterator)
            return compiled(state, put_batch({k: batch[k] for k in BATCH_KEYS}, mesh))[0]

        state = step(step(state, iterator), iterator)
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.save(2, state, iterator, config)
        state = step(state, iterator)
        again = data.make_train_iterator(config.data)
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            resumed, number = checkpoints.restore(program.state, again, config)
        resumed = step(resumed, again)
    assert number == 2
    for x, y in zip(jax.tree.leaves(resumed), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x, y)

    after = _values(state)
    changed = {path for path in after if (after[path] != before[path]).any()}
    # FusedKV: the lower half of the layers is one run, the upper half the other.
    assert changed == {path for path in after if path[0] == "mixing" or path[:2] == ("runs", 1)}
    assert len(changed) > 5 and changed != set(after)
    trained = sum(after[path].size for path in changed)
    counters = [leaf for leaf in jax.tree.leaves(state.opt_state) if not leaf.ndim]
    held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) - len(counters)
    assert held == 2 * trained


def _values(state):
    """Parameters by path."""
    return {path: np.array(leaf[...]) for path, leaf in nnx.to_flat_state(state.params)}


def test_a_layout_without_readers_is_refused(toy):
    with pytest.raises(ValueError, match="every layer of this layout has keys and values of its"):
        chosen_parameters(toy.model.replace(layout="mha").kv_layout, "changed")
