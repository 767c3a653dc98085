"""The loss, gradient accumulation and the guard against non-finite values."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fusedkv_jax.config import MLAConfig
from fusedkv_jax.sharding import PARAMETERS, matrix_name
from fusedkv_jax.training import (
    StepOptions,
    create_state,
    learning_rate_schedule,
    make_optimizer,
    make_train_step,
)
from fusedkv_jax.training.loss import sum_cross_entropy
from fusedkv_jax.training.state import abstract_model, initial_state
from fusedkv_jax.training.step import accumulate_gradients, cast_matrices, is_spike


def _batch(rng, rows=8, length=12, vocab=258):
    """Rows with 2 documents and different amounts of padding, the last row nearly all of it."""
    used = np.concatenate([rng.integers(4, length + 1, rows - 1), [1]])[:, None]
    place = np.arange(length)[None]
    return {
        "tokens": rng.integers(0, vocab, (rows, length)).astype(np.int32),
        "targets": rng.integers(0, vocab, (rows, length)).astype(np.int32),
        "segment_ids": np.where(place < used, place // 6, -1).astype(np.int32),
        "positions": np.broadcast_to(place % 6, (rows, length)).astype(np.int32),
        "loss_mask": (place < used).astype(np.float32),
    }


def test_loss_is_the_masked_sum_of_negative_log_likelihoods():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 5, 11)).astype(np.float32) * 4
    targets = rng.integers(0, 11, (3, 5))
    mask = rng.integers(0, 2, (3, 5))
    shifted = logits.astype(np.float64)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    # Whatever stands at the places that do not count must not matter, infinities included.
    targets = np.where(mask, targets, -7)
    logits = np.where(mask[..., None], logits, np.inf)
    total, count = sum_cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(mask))
    assert float(count) == mask.sum()
    np.testing.assert_allclose(float(total), (losses * mask).sum(), rtol=1e-6)


def test_loss_of_bfloat16_logits_is_float32():
    logits = jnp.zeros((1, 2, 1000), jnp.bfloat16)
    total, _ = sum_cross_entropy(logits, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2)))
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(float(total), 2 * np.log(1000), rtol=1e-6)


def test_accumulation_equals_one_big_batch(toy, toy_params):
    graphdef, _ = abstract_model(toy.model)
    gradients = jax.jit(accumulate_gradients, static_argnums=(0, 3))
    batch = _batch(np.random.default_rng(3))
    loss, grads = gradients(graphdef, toy_params, batch, 1)
    part_loss, part_grads = gradients(graphdef, toy_params, batch, 4)
    np.testing.assert_allclose(part_loss, loss, rtol=1e-6)
    for found, wanted in zip(jax.tree.leaves(part_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_loss_is_the_mean_over_tokens_not_over_rows(toy, toy_params):
    graphdef, _ = abstract_model(toy.model)
    batch = _batch(np.random.default_rng(4))
    loss, _ = jax.jit(accumulate_gradients, static_argnums=(0, 3))(graphdef, toy_params, batch, 2)
    model = nnx.merge(graphdef, toy_params)
    names = ("tokens", "segment_ids", "positions")
    logits = model(*(jnp.asarray(batch[name]) for name in names))
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    losses = -np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
    mask = batch["loss_mask"]
    np.testing.assert_allclose(loss, (losses * mask).sum() / mask.sum(), rtol=1e-5)


class _RootModel(nnx.Module):
    """Finite loss everywhere, infinite gradient at zero: logits are square roots."""

    config = types.SimpleNamespace(logit_softcap=None)

    def __init__(self):
        self.weight = nnx.Param(jnp.zeros((258,)))

    def hidden(self, tokens, segment_ids, positions):
        return jnp.broadcast_to(jnp.sqrt(self.weight[...]), (*tokens.shape, 258))

    @property
    def head_matrix(self):
        return jnp.eye(258)


def _root_state():
    graphdef, params = nnx.split(_RootModel(), nnx.Param)
    optimizer = optax.adam(0.1)
    state = initial_state(params, optimizer)
    return graphdef, optimizer, state


def _assert_same(tree, other):
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("cause", ["loss", "gradient"])
def test_non_finite_step_changes_nothing_but_the_counters(cause):
    graphdef, optimizer, state = _root_state()
    if cause == "loss":
        state = dataclasses.replace(state, params=jax.tree.map(lambda w: w - 1.0, state.params))
    step = jax.jit(make_train_step(graphdef, optimizer, lambda i: 1.0 + i))
    new, metrics = step(state, _batch(np.random.default_rng(5)))
    assert np.isfinite(metrics["loss"]) == (cause == "gradient")
    assert not np.isfinite(metrics["grad_norm"])
    _assert_same(new.params, state.params)
    _assert_same(new.opt_state, state.opt_state)
    assert (int(new.step), int(new.skipped), int(metrics["skipped"])) == (1, 1, 1)
    # The schedule counts updates, so it does not move with a skipped step.
    _, again = step(new, _batch(np.random.default_rng(6)))
    assert float(again["learning_rate"]) == 1.0


def test_finite_step_updates_and_reports(toy, toy_state):
    optimizer = make_optimizer(toy.optimizer, 10)
    graphdef, _ = abstract_model(toy.model)
    schedule = learning_rate_schedule(toy.optimizer, 10)
    step = jax.jit(make_train_step(graphdef, optimizer, schedule), donate_argnums=0)
    state = toy_state
    batch = _batch(np.random.default_rng(7))
    loss, grads = jax.jit(accumulate_gradients, static_argnums=(0, 3))(
        graphdef, state.params, batch, 1
    )
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    losses = []
    for i in range(10):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        np.testing.assert_allclose(metrics["learning_rate"], schedule(i), rtol=1e-6)
        if i == 0:
            np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
            np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    assert losses[-1] < losses[0] - 0.5  # one batch, again and again
    assert (int(state.step), int(state.skipped)) == (10, 0)


def test_a_spike_is_far_above_enough_recent_values():
    rng = np.random.default_rng(8)
    values = rng.uniform(2.0, 3.0, 128).astype(np.float32)
    bound = values.mean() + 4.0 * values.std()
    for value, wanted in ((bound - 0.01, False), (bound + 0.01, True), (0.0, False)):
        assert bool(is_spike(jnp.asarray(values), jnp.float32(value), 4.0)) == wanted
    few = np.where(np.arange(128) < 64, values, -1.0)
    bound = values[:64].mean() + 4.0 * values[:64].std()
    for value, wanted in ((bound - 0.01, False), (bound + 0.01, True)):
        assert bool(is_spike(jnp.asarray(few), jnp.float32(value), 4.0)) == wanted
    fewer = np.where(np.arange(128) < 63, values, -1.0)
    assert not is_spike(jnp.asarray(fewer), jnp.float32(99.0), 4.0)


def test_a_spike_updates_nothing_and_a_new_level_is_accepted_after_a_while(toy, toy_state):
    optimizer = make_optimizer(toy.optimizer, 400)
    graphdef, _ = abstract_model(toy.model)
    schedule = learning_rate_schedule(toy.optimizer, 400)
    step = jax.jit(make_train_step(graphdef, optimizer, schedule, StepOptions(skip_spikes=6.0)))
    rng = np.random.default_rng(9)
    recent = {name: jnp.asarray(rng.uniform(1, 2, 128), jnp.float32) for name in toy_state.recent}
    state = dataclasses.replace(toy_state, recent=recent)
    batch = _batch(rng)
    new, metrics = step(state, batch)  # the initial loss is ln 258 = 5.6
    assert (int(new.step), int(new.skipped)) == (1, 1)
    _assert_same(new.params, state.params)
    _assert_same(new.opt_state, state.opt_state)
    np.testing.assert_array_equal(new.recent["loss"][0], metrics["loss"])
    np.testing.assert_array_equal(new.recent["loss"][1:], recent["loss"][1:])
    for _ in range(20):
        new, _ = step(new, batch)
    assert 0 < int(new.skipped) < 10
    # A loss that is not finite leaves no value behind.
    broken = dataclasses.replace(
        state, params=jax.tree.map(lambda leaf: leaf * jnp.nan, state.params)
    )
    assert float(step(broken, batch)[0].recent["loss"][0]) == -1.0


def test_bfloat16_gradients_update_float32_parameters(toy, toy_state):
    graphdef, _ = abstract_model(toy.model)
    batch = _batch(np.random.default_rng(10))
    gradients = jax.jit(accumulate_gradients, static_argnums=(0, 3), static_argnames="dtype")
    loss, wanted = gradients(graphdef, toy_state.params, batch, 2)
    half_loss, found = gradients(graphdef, toy_state.params, batch, 2, dtype="bfloat16")
    np.testing.assert_allclose(half_loss, loss, rtol=1e-2)
    differ = False
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == jnp.float32  # sums over microbatches
        assert np.linalg.norm(x - y) < 0.05 * np.linalg.norm(y) + 1e-6
        differ |= bool((x != y).any())
    assert differ
    cast = jax.tree_util.tree_flatten_with_path(cast_matrices(toy_state.params, jnp.bfloat16))[0]
    for path, leaf in cast:
        text = jax.tree_util.keystr(path)
        is_matrix = any(f"'{name}'" in text for name in PARAMETERS)
        assert leaf.dtype == (jnp.bfloat16 if is_matrix else jnp.float32), text
    assert len({leaf.dtype for _, leaf in cast}) == 2


@pytest.mark.parametrize("layout", ["fusedkv", "mla"])
def test_gradients_of_a_bfloat16_model_are_rounded_once(toy, layout):
    """In float32 mode they are float32 sums of bfloat16 products, not rounded to bfloat16."""
    mla = MLAConfig(kv_lora_rank=8, nope_dim=8, rope_dim=8, v_dim=8)
    changes = {"mla": mla, "layout": "mha"} if layout == "mla" else {"layout": layout}
    config = toy.model.replace(dtype="bfloat16", **changes)
    graphdef, _ = abstract_model(config)
    params = create_state(config, optax.sgd(1.0), seed=0).params
    gradients = jax.jit(accumulate_gradients, static_argnums=(0, 3))
    _, found = gradients(graphdef, params, _batch(np.random.default_rng(11)), 1)
    for path, leaf in jax.tree_util.tree_flatten_with_path(found)[0]:
        if jnp.any(leaf != 0) and matrix_name(path) is not None:
            fine = leaf != leaf.astype(jnp.bfloat16).astype(jnp.float32)
            assert fine.mean() > 0.1, jax.tree_util.keystr(path)
