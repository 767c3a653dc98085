"""Layer dropout and the early-exit loss, against their definitions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fusedkv_jax.training import ExperimentConfig, create_state
from fusedkv_jax.training import early_exit as ee
from fusedkv_jax.training.early_exit import EarlyExitConfig
from fusedkv_jax.training.loss import batch_loss, head_cross_entropy, sum_cross_entropy
from fusedkv_jax.training.state import abstract_model
from fusedkv_jax.training.step import accumulate_gradients

L, STEPS = 6, 40


def _batch(rows=4, length=8):
    rng = np.random.default_rng(1)
    return {
        "tokens": jnp.asarray(rng.integers(0, 258, (rows, length)), jnp.int32),
        "targets": jnp.asarray(rng.integers(0, 258, (rows, length)), jnp.int32),
        "segment_ids": jnp.zeros((rows, length), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length)),
        "loss_mask": jnp.ones((rows, length)).at[-1, 2:].set(0),
    }


@pytest.mark.parametrize("weights", ["cumulative", "uniform", "linear", "sqrt", "inverse"])
@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "none"])
def test_weights_sum_to_one_and_follow_the_curriculum(weights, curriculum):
    config = EarlyExitConfig(loss_scale=0.7, weights=weights, curriculum=curriculum, rotation=4)
    sizes = {
        "cumulative": [0, 1, 3, 6, 10, 5 / 0.7 + 10],
        "uniform": [1, 1, 1, 1, 1, 1 / 0.7],
        "linear": [1, 2, 3, 4, 5, 6 / 0.7],
        "sqrt": [*np.sqrt(np.arange(1, 6)), np.sqrt(6) / 0.7],
        "inverse": [*(1 / np.arange(1, 6)), 1 / 6 / 0.7],
    }[weights]
    for step in (0, 1, 7, 19, 39):
        found = ee.exit_weights(config, L, jnp.int32(step), STEPS)
        on = {
            "rotational": [layer % 4 == step % 4 for layer in range(L)],
            "gradual": [step / STEPS >= 0.5 * (L - layer) / L for layer in range(L)],
            "none": [True] * L,
        }[curriculum]
        wanted = np.where([*on[:-1], True], sizes, 0)
        np.testing.assert_allclose(found, wanted / wanted.sum(), rtol=1e-5)
        np.testing.assert_allclose(found.sum(), 1, rtol=1e-6)


def test_dropout_rates_and_their_draws():
    config = EarlyExitConfig(max_dropout=0.4, dropout_curriculum="exponential")
    for step in (0, 13, STEPS - 1):
        time = 2 ** (step / (STEPS - 1)) - 1
        wanted = [0.4 * (2 ** (layer / (L - 1)) - 1) * time for layer in range(L)]
        rates = ee.dropout_rates(config, L, jnp.int32(step), STEPS)
        np.testing.assert_allclose(rates, wanted, rtol=1e-5, atol=1e-7)
    rows = 20000
    dropped = 1 - np.asarray(ee.kept_layers(rates, 3, jnp.int32(5), rows)).mean(0)
    np.testing.assert_allclose(dropped, rates, atol=5 * np.sqrt(0.25 / rows))
    again, other = (ee.kept_layers(rates, 3, jnp.int32(s), 64) for s in (5, 6))
    np.testing.assert_array_equal(again, ee.kept_layers(rates, 3, jnp.int32(5), 64))
    assert not np.array_equal(again, other)


def test_off_is_the_plain_program(toy):
    assert toy.early_exit == EarlyExitConfig()
    assert ee.make_objective(toy.early_exit, 4, 10, 0) is None


def test_json_round_trip(toy):
    config = dataclasses.replace(toy, early_exit=EarlyExitConfig(max_dropout=0.1, weights="sqrt"))
    assert ExperimentConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_dropout", 1.0), ("loss_scale", -1.0), ("rotation", 0), ("weights", "log")],
)
def test_bad_values_are_refused_by_name(field, value, without_type_checks):
    with pytest.raises(ValueError, match=f"early_exit.{field}="):
        EarlyExitConfig(**{field: value})


def _truncated(model, layers):
    """A model of the lowest layers only, which share the norm and the head."""
    outputs = []
    for number in layers:
        config = model.config.replace(num_layers=number, layout="mha")
        small = nnx.eval_shape(lambda config=config: type(model)(config, rngs=nnx.Rngs(0)))
        for name in ("embedding", "final_norm", "head"):
            setattr(small, name, getattr(model, name))
        graph, params = nnx.split(model.runs[0][0])
        block = nnx.merge(graph, jax.tree.map(lambda leaf, n=number: leaf[:n], params))
        small.runs = nnx.List([nnx.List([block])])
        outputs.append(small)
    return outputs


def test_exit_losses_are_those_of_truncated_models(toy):
    """Of an mha model, of which every prefix of layers is a model."""
    config = toy.model.replace(layout="mha")
    params = create_state(config, optax.sgd(1.0), 0).params
    model = nnx.merge(abstract_model(config)[0], params)
    batch, weights = _batch(), jnp.asarray([0.3, 0.0, 0.2, 0.5])
    found, count = jax.jit(lambda b, w: ee.exit_loss(model, b, w))(batch, weights)
    wanted = 0.0
    for small, weight in zip(_truncated(model, (1, 3, 4)), (0.3, 0.2, 0.5), strict=True):
        logits = small(batch["tokens"], batch["segment_ids"], batch["positions"])
        wanted += weight * sum_cross_entropy(logits, batch["targets"], batch["loss_mask"])[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert float(count) == float((batch["loss_mask"] != 0).sum())


def test_accumulated_gradients_and_rows_that_skip_nothing(toy, toy_params):
    graphdef, _ = abstract_model(toy.model)
    batch = _batch()
    config = EarlyExitConfig(max_dropout=0.9, loss_scale=1.0, rotation=2)
    objective = ee.make_objective(config, 4, 10, seed=0)
    with_kept, loss = objective(jnp.int32(9), batch)
    assert 0 < with_kept["kept"].mean() < 1
    gradients = jax.jit(accumulate_gradients, static_argnums=(0, 3, 4))
    total, grads = gradients(graphdef, toy_params, with_kept, 1, loss)
    part_total, part_grads = gradients(graphdef, toy_params, with_kept, 2, loss)
    np.testing.assert_allclose(part_total, total, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(part_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    # No row skips anything, and only the last layer counts: today's loss, to the bit.
    every = batch | {"kept": jnp.ones((4, 4), bool)}
    model = nnx.merge(graphdef, toy_params)
    plain = batch_loss(graphdef, toy_params, batch)[0]
    for part in (batch, every):
        found = jax.jit(lambda b: ee.exit_loss(model, b, jnp.zeros(4).at[3].set(1)))(part)[0]
        np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_row_that_skips_a_layer_keeps_its_hidden_states(toy, toy_params, remat):
    graphdef, _ = abstract_model(toy.model.replace(remat=remat))
    model, batch = nnx.merge(graphdef, toy_params), _batch()
    kept = jnp.ones((4, 4), bool).at[0, 2].set(False).at[1, 0].set(False)
    x = jax.jit(lambda b, kept: model.layer_outputs(b["tokens"], kept=kept))(batch, kept)
    np.testing.assert_array_equal(x[2, 0], x[1, 0])
    np.testing.assert_array_equal(x[0, 1], model.embed(batch["tokens"])[1])
    whole = model.layer_outputs(batch["tokens"])
    np.testing.assert_allclose(x[:, 2:], whole[:, 2:], rtol=1e-5, atol=1e-6)
    assert float(abs(x[2, 1] - x[1, 1]).max()) > 1e-3


def test_layers_without_weight_cost_nothing(toy, toy_params, monkeypatch):
    """Counted where the losses are computed, at run time and with gradients."""
    calls = []

    def counted(*arguments):
        jax.debug.callback(lambda: calls.append(1))
        return head_cross_entropy(*arguments)

    monkeypatch.setattr(ee, "head_cross_entropy", counted)
    graphdef, _ = abstract_model(toy.model)
    batch = _batch()

    @jax.jit
    def loss(params, weights):
        return ee.exit_loss(nnx.merge(graphdef, params), batch, weights)[0]

    for weights, layers in (([0, 0, 0.4, 0.6], 2), ([0.1, 0.2, 0.3, 0.4], 4), ([0, 0, 0, 1], 1)):
        calls.clear()
        jax.block_until_ready(loss(toy_params, jnp.asarray(weights, jnp.float32)))
        jax.effects_barrier()
        assert len(calls) == layers
