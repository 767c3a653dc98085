"""The optimizer against the formulas of AdamW, computed in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fusedkv_jax.model import weight_decay_mask
from fusedkv_jax.training import OptimizerConfig, learning_rate_schedule, make_optimizer
from fusedkv_jax.training.state import abstract_state


def _learning_rate(config: OptimizerConfig, steps: int, i: int) -> float:
    warmup = min(config.warmup_steps, steps // 2)
    if i + 1 <= warmup:
        return config.learning_rate * (i + 1) / warmup
    low = config.final_fraction * config.learning_rate
    part = (i + 1 - warmup) / (steps - warmup)
    return low + (config.learning_rate - low) * (1 + math.cos(math.pi * part)) / 2


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (100, 0), (7, 2000), (1, 5), (2, 1)])
def test_schedule_is_linear_then_cosine(steps, warmup):
    config = OptimizerConfig(learning_rate=3e-4, warmup_steps=warmup)
    schedule = learning_rate_schedule(config, steps)
    found = [float(schedule(i)) for i in range(steps)]
    np.testing.assert_allclose(
        found, [_learning_rate(config, steps, i) for i in range(steps)], rtol=2e-5
    )
    assert found[-1] == pytest.approx(3e-5, rel=1e-5)
    assert min(found) > 0


def _numpy_adamw(config, steps, params, gradients, decayed):
    """Parameters after one update per gradient, in float64."""
    params = [p.astype(np.float64) for p in params]
    mean = [np.zeros_like(p) for p in params]
    square = [np.zeros_like(p) for p in params]
    for i, grads in enumerate(gradients):
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads))
        rate = _learning_rate(config, steps, i)
        for j, gradient in enumerate(grads):
            g = gradient * min(1.0, config.clip_norm / norm)
            mean[j] = config.beta1 * mean[j] + (1 - config.beta1) * g
            square[j] = config.beta2 * square[j] + (1 - config.beta2) * g**2
            m = mean[j] / (1 - config.beta1 ** (i + 1))
            v = square[j] / (1 - config.beta2 ** (i + 1))
            step = m / (np.sqrt(v) + config.eps) + config.weight_decay * decayed[j] * params[j]
            params[j] = params[j] - rate * step
    return params


def test_updates_follow_adamw_with_clipping_and_mask(toy, toy_params):
    steps = 6
    optimizer = make_optimizer(toy.optimizer, steps)
    update = jax.jit(optimizer.update)
    leaves, structure = jax.tree.flatten(toy_params)
    rng = np.random.default_rng(1)
    # The first gradient is far above the clipping norm, the second far below, the third between.
    gradients = [
        [scale * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
        for scale in (1.0, 1e-4, 1e-2)
    ]
    params, opt_state = toy_params, optimizer.init(toy_params)
    for grads in gradients:
        updates, opt_state = update(structure.unflatten(grads), opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
    decayed = jax.tree.leaves(weight_decay_mask(toy_params))
    start = [np.asarray(leaf) for leaf in leaves]
    wanted = _numpy_adamw(toy.optimizer, steps, start, gradients, decayed)
    for found, expected in zip(jax.tree.leaves(params), wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6)


def test_only_matrices_and_embeddings_decay(toy, toy_params):
    optimizer = make_optimizer(toy.optimizer, 10)
    params = jax.tree.map(jnp.ones_like, toy_params)
    zeros = jax.tree.map(jnp.zeros_like, toy_params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    decayed = {
        name: bool(np.all(np.asarray(update) != 0)) for name, update in _by_path(updates).items()
    }
    undecayed = {name for name, is_decayed in decayed.items() if not is_decayed}
    assert undecayed == {n for n in decayed if "norm" in n or "weights" in n or "bias" in n}
    assert undecayed and undecayed != set(decayed)


def _by_path(state: nnx.State) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def test_moments_are_float32_for_bfloat16_parameters(toy):
    optimizer = make_optimizer(toy.optimizer, 10)
    state = abstract_state(toy.model.replace(param_dtype="bfloat16"), optimizer)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} >= {jnp.dtype("bfloat16")}
    floating = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert {leaf.dtype for leaf in floating} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("clip_norm", -1.0),
        ("eps", 0.0),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("final_fraction", 1.5),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
    ],
)
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"optimizer\.{field}={value}"):
        OptimizerConfig(**{field: value})
