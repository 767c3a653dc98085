"""The sampler against its definition in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusedkv_jax.generation.sampling import (
    SamplerInputs,
    SamplingError,
    SamplingParams,
    restrict,
    sample,
)

VOCAB = 12


def support(logits, params: SamplingParams) -> set[int]:
    """Tokens that may be drawn: min_p, then top_k, then top_p, ties by token id."""
    logits = np.asarray(logits, np.float64) / params.temperature
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    ranked = sorted(range(len(logits)), key=lambda t: (-logits[t], t))
    ranked = [t for t in ranked if probabilities[t] >= params.min_p * probabilities.max()]
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    left, chosen, total = sum(probabilities[t] for t in ranked), set(), 0.0
    for token in ranked:
        if total >= params.top_p * left and params.top_p < 1:
            break
        chosen.add(token)
        total += probabilities[token]
    return chosen


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(top_k=1),
    SamplingParams(top_k=5, temperature=2.0),
    SamplingParams(top_k=100),
    SamplingParams(top_p=0.3),
    SamplingParams(top_p=0.85, temperature=1.5),
    SamplingParams(min_p=0.2),
    SamplingParams(min_p=1.0),
    SamplingParams(top_k=6, top_p=0.7, min_p=0.05, temperature=0.8),
]


def test_support_is_exactly_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(50):
        logits = rng.normal(size=(len(PARAMS), VOCAB)).astype(np.float32) * 2
        logits[:, 3] = logits[:, 7]  # a tie
        temperature = np.array([p.temperature for p in PARAMS], np.float32)[:, None]
        kept = restrict(jnp.asarray(logits / temperature), SamplerInputs.create(PARAMS))
        for row, params in enumerate(PARAMS):
            found = set(np.flatnonzero(np.isfinite(kept[row])).tolist())
            assert found == support(logits[row], params), params


def draw_many(logits, params, draws):
    """Draws of one request at many positions."""
    inputs = SamplerInputs.create([params] * draws)
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, len(logits)))
    seen = jnp.zeros(rows.shape, bool)
    return np.asarray(jax.jit(sample)(rows, inputs, jnp.arange(draws), seen))


def test_draws_follow_the_distribution():
    logits = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32)
    params = SamplingParams(temperature=1.3, top_k=8, seed=11)
    draws = 200_000
    counts = np.bincount(draw_many(logits, params, draws), minlength=VOCAB)
    kept = sorted(support(logits, params))
    scaled = np.exp(logits[kept].astype(np.float64) / params.temperature)
    expected = draws * scaled / scaled.sum()
    assert counts.sum() == counts[kept].sum() == draws
    chi_square = float(np.sum((counts[kept] - expected) ** 2 / expected))
    assert chi_square < 24.3  # 0.999 quantile at 7 degrees of freedom


def test_greedy_rows_beside_random_ones():
    logits = np.random.default_rng(2).normal(size=(3, VOCAB)).astype(np.float32)
    params = [SamplingParams(temperature=0), SamplingParams(seed=1), SamplingParams(temperature=0)]
    seen = jnp.zeros(logits.shape, bool)
    positions = jnp.array([4, 5, 6])
    chosen = sample(jnp.asarray(logits), SamplerInputs.create(params), positions, seen)
    assert chosen[0] == logits[0].argmax() and chosen[2] == logits[2].argmax()


def test_a_draw_depends_on_seed_and_position_only():
    logits = jnp.zeros((4, 1000))
    seen = jnp.zeros(logits.shape, bool)

    def draw(seeds, positions):
        inputs = SamplerInputs.create([SamplingParams(seed=s) for s in seeds])
        return sample(logits, inputs, jnp.asarray(positions), seen).tolist()

    first = draw([5, 6, 7, 8], [10, 11, 12, 13])
    moved = draw([8, 7, 6, 5], [13, 12, 11, 10])
    assert first == moved[::-1]
    assert len(set(first)) == 4
    assert draw([5, 5, 5, 5], [10, 11, 12, 10])[0::3] == [first[0]] * 2


def test_repetition_penalty():
    logits = jnp.array([[2.0, 1.9, -1.0, -1.1]])
    seen = jnp.array([[True, False, True, False]])
    for penalty, likeliest in ((1.0, 0), (1.2, 1), (0.5, 0)):
        params = SamplingParams(temperature=0, repetition_penalty=penalty)
        token = sample(logits, SamplerInputs.create([params]), jnp.array([3]), seen)
        assert int(token[0]) == likeliest
    # A seen token with a negative logit falls further, it does not rise.
    negative = jnp.array([[-1.0, -1.1, -9.0, -9.0]])
    params = SamplingParams(temperature=0, repetition_penalty=1.2)
    token = sample(negative, SamplerInputs.create([params]), jnp.array([3]), seen)
    assert int(token[0]) == 1


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("max_tokens", 0),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_values_out_of_bounds_are_refused(field, value):
    with pytest.raises(SamplingError, match=f"{field}=.*; use"):
        SamplingParams(**{field: value})
