"""Pruned fusion: what is dropped, what stays, and what is reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusedkv_jax as fkv
from fusedkv_jax.compression import pruning
from fusedkv_jax.compression.pruning import prune_sources
from fusedkv_jax.layouts import KINDS, runs
from tests.model import small

TOKENS = small.tokens(2, 16, seed=3)


def _log_probs(model):
    return np.asarray(jax.nn.log_softmax(model(TOKENS)), np.float64)


def _divergence(model, other):
    p, q = _log_probs(model), _log_probs(other)
    return (np.exp(p) * (p - q)).sum(-1).mean()


def _sources(model):
    layout = model.config.kv_layout
    return {
        (kind, i, j)
        for kind in KINDS
        for i, layer in enumerate(layout.layers)
        for j in layer.stream(kind).sources
    }


@pytest.mark.parametrize("geometry", ["gqa", "mla"])
def test_each_step_drops_what_brute_force_would(geometry):
    """Scores come from zero weights in one program; here every candidate is a model of its own."""
    model = small.decoder(small.config("fusedkv", geometry, num_layers=4))
    _, report = prune_sources(model, 1.3, TOKENS, refit=False)
    assert report.steps[0].divergence == 0 and len(report.steps) == {"gqa": 3, "mla": 2}[geometry]
    trial = pruning._Pruning(model, TOKENS, False)
    kept = {name: (0, 1) for name in trial.streams}
    for step in report.steps[1:2]:
        found = {}
        for unit in trial.units(1):
            for place in (0, 1):
                pruned = trial.build(kept | dict.fromkeys(unit, (1 - place,)))
                dropped = frozenset(_sources(model) - _sources(pruned))
                found[dropped] = _divergence(model, pruned)
        assert len(found) == {"gqa": 8, "mla": 4}[geometry]
        best = min(found, key=lambda dropped: found[dropped])
        assert best == frozenset(step.dropped)
        np.testing.assert_allclose(step.divergence, found[best], rtol=1e-3)


def test_budgets_are_monotone_and_nested():
    model = small.decoder(small.config("fusedkv"))
    whole, report = prune_sources(model, 1.5, TOKENS)
    np.testing.assert_array_equal(whole(TOKENS), model(TOKENS))
    assert len(report.steps) == 1 and report.steps[0].reads == 1.5

    least, report = prune_sources(model, 1.0, TOKENS)
    reads = [step.reads for step in report.steps]
    np.testing.assert_allclose(reads, np.linspace(1.5, 1, 9))  # 4 layers, keys and values
    assert report.steps[-1].bytes_per_token == fkv.costs.decode_cache_reads(least.config, 16)
    one_each = fkv.costs.decode_cache_reads(small.config("fusedkv_lite"), 16)
    assert report.steps[-1].bytes_per_token == one_each
    np.testing.assert_allclose(_divergence(model, least), report.steps[-1].divergence, rtol=1e-3)
    assert f"{reads[1]:.3f}x" in str(report)

    some, partial = prune_sources(model, 1.3, TOKENS)
    assert partial.steps == report.steps[: len(partial.steps)]
    assert partial.steps[-1].reads <= 1.3 < partial.steps[-2].reads
    dropped = {name for step in partial.steps for name in step.dropped}
    assert dropped == _sources(model) - _sources(some)
    # No zero weights are kept, and the model decodes as any other.
    assert all(float(abs(w[...]).min()) > 0 for w in some.mixing.weights)
    cache = fkv.KVCache.create(some.config, batch_size=2, max_length=16)
    logits, _ = fkv.prefill(some, TOKENS, jnp.full(2, 16, jnp.int32), cache)
    np.testing.assert_allclose(logits, some(TOKENS)[:, -1], atol=1e-4)


def test_refitted_weights_are_the_least_squares():
    model = small.decoder(small.config("fusedkv"))
    trial = pruning._Pruning(model, TOKENS, True)
    graph, params = nnx.split(model)
    cache = fkv.KVCache.create(model.config, batch_size=2, max_length=16)
    count = jnp.full(2, 16, jnp.int32)
    cache = jax.jit(lambda p, c: nnx.merge(graph, p).extend(TOKENS, count, c, "none")[1])(
        params, cache
    )
    for kind in KINDS:
        name = (kind, 5)
        low, mid = (
            np.asarray((cache.keys if kind == "key" else cache.values)[0][slot], np.float64)
            for slot in (0, 3)
        )
        weights = trial.weights[name]  # [J, K, H], of keys one for a rotary pair
        if kind == "key":
            weights = np.concatenate([weights, weights], axis=-1)
        target = weights[0] * low + weights[1] * mid
        channels = low.shape[-1]
        wanted = np.zeros_like(trial.weights[name][0])
        for head, channel in np.ndindex(*wanted.shape):
            pair = [channel, channel + channels // 2] if kind == "key" else [channel]
            x, y = (array[:, :, head][..., pair].ravel() for array in (mid, target))
            wanted[head, channel] = np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]
        np.testing.assert_allclose(trial._fitted(name, (1,))[0], wanted, rtol=1e-5)


def test_groups_keep_layers_scanned():
    model = small.decoder(small.config("fusedkv"))
    pruned, report = prune_sources(model, 1.0, TOKENS, group=4)
    assert [len(step.dropped) for step in report.steps] == [0, 4, 4]
    assert [run.repeats for run in runs(pruned.config.kv_layout)] == [4, 4]


@pytest.mark.parametrize(
    ("spec", "budget", "group", "message"),
    [
        ("mha", 1.2, 1, "the layout has none"),
        ("fusedkv_lite", 1.2, 1, "the layout has none"),
        ("fusedkv", 0.9, 1, "budget=0.9; use at least 1"),
        ("fusedkv", 1.2, 0, "group=0; use at least 1"),
    ],
)
def test_what_cannot_be_pruned_is_refused(spec, budget, group, message):
    with pytest.raises(ValueError, match=message):
        prune_sources(small.decoder(small.config(spec)), budget, TOKENS, group=group)
