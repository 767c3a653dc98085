"""The sampler against its definition in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusedkv_jax.generation.params import BeamSearchParams
from fusedkv_jax.generation.sampling import (
    SamplerInputs,
    SamplingError,
    SamplingParams,
    adjust,
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


@pytest.mark.parametrize("chosen", [dict(top_k=8), dict(top_p=0.9), dict(min_p=0.05, top_k=9)])
def test_draws_follow_the_distribution(chosen):
    logits = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32)
    params = SamplingParams(temperature=1.3, seed=11, **chosen)
    rows, rounds = 2000, 100
    inputs = SamplerInputs.create([params] * rows)
    wide = jnp.broadcast_to(jnp.asarray(logits), (rows, VOCAB))
    seen = jnp.zeros(wide.shape, bool)

    @jax.jit
    def count(first):
        def add(counts, start):
            drawn = sample(wide, inputs, start * rows + jnp.arange(rows), seen)
            return counts + jnp.bincount(drawn, length=VOCAB), None

        return jax.lax.scan(add, jnp.zeros(VOCAB, jnp.int32), first + jnp.arange(rounds))[0]

    counts, draws = np.asarray(count(0)), rows * rounds
    kept = sorted(support(logits, params))
    scaled = np.exp(logits[kept].astype(np.float64) / params.temperature)
    expected = draws * scaled / scaled.sum()
    assert counts.sum() == counts[kept].sum() == draws
    chi_square = float(np.sum((counts[kept] - expected) ** 2 / expected))
    # 0.999 quantile, by Wilson and Hilferty.
    freedom = len(kept) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < quantile


def adjusted(logits, params, seen, counts, forbidden):
    """The definition: exclusions, bias, then repetition, frequency, presence."""
    logits = np.array(logits, np.float64)
    logits[[token for token in forbidden if token >= 0]] = -np.inf
    for token, bias in params.logit_bias:
        logits[token] += bias
    for token in np.flatnonzero(seen):
        penalty = params.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    return logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)


def test_bias_and_penalties_are_the_definition():
    rng = np.random.default_rng(3)
    params = [
        SamplingParams(),
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(frequency_penalty=0.4),
        SamplingParams(presence_penalty=-1.1),
        SamplingParams(logit_bias={0: 3.0, 11: -2.5, 5: 100}),
        SamplingParams(
            logit_bias={t: 0.5 * t for t in range(7)},
            repetition_penalty=0.6,
            frequency_penalty=-2,
            presence_penalty=2,
        ),
    ]
    for _ in range(20):
        logits = rng.normal(size=(len(params), VOCAB)).astype(np.float32) * 2
        counts = rng.integers(0, 4, logits.shape).astype(np.int32)
        seen = (counts > 0) | (rng.random(logits.shape) < 0.3)
        forbidden = rng.integers(-1, VOCAB, (len(params), 3)).astype(np.int32)
        inputs = SamplerInputs.create(params)
        found = adjust(jnp.asarray(logits), inputs, *map(jnp.asarray, (seen, counts, forbidden)))
        for row, own in enumerate(params):
            expected = adjusted(logits[row], own, seen[row], counts[row], forbidden[row])
            np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)


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
        ("n", 0),
        ("n", 1.5),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("temperature", float("inf")),
        ("temperature", 1e300),  # infinite in float32
        ("temperature", 10**400),
        ("n", 10**6),
        ("top_k", 2**31),
        ("top_p", float("nan")),
        ("min_p", float("nan")),
        ("repetition_penalty", float("inf")),
        ("repetition_penalty", 1e-60),  # 0 in float32
        ("frequency_penalty", float("nan")),
        ("presence_penalty", float("-inf")),
        ("top_k", -2),
        ("top_k", 0.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("seed", -1),
        ("seed", 2**32),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [3]),
        ("stop", 5),
        ("stop", b"x"),
        ("bad_words", 5),
        ("stop_token_ids", 5),
        ("stop_token_ids", "12"),
        ("stop_token_ids", [True]),
        ("ignore_eos", "false"),
        ("skip_special_tokens", 0),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("bad_words", ["", "b"]),
        ("logit_bias", {3: 101}),
        ("logit_bias", {3: float("nan")}),
        ("logit_bias", {-3: 1}),
        ("logit_bias", {3: float("inf")}),
        ("logit_bias", {3: True}),
        ("logit_bias", 5),
        ("logit_bias", [3]),
        ("logprobs", -2),
        ("logprobs", float("nan")),
        ("prompt_logprobs", 1.0),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_values_out_of_bounds_are_refused(field, value):
    with pytest.raises(SamplingError, match=f"{field}=.*; use") as error:
        SamplingParams(**{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("length_penalty", float("nan")),
        ("length_penalty", 1e30),
        ("beam_width", 2.0),
        ("ignore_eos", "no"),
        ("early_stopping", "yes"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_beam_values_out_of_bounds_are_refused(field, value):
    with pytest.raises(SamplingError, match=f"{field}=.*; use"):
        BeamSearchParams(**{field: value})


def test_several_greedy_outputs_are_refused():
    with pytest.raises(SamplingError, match="n=2; use 1 with temperature=0"):
        SamplingParams(n=2, temperature=0)


def test_parameters_are_hashable_and_equal_in_any_spelling():
    one = SamplingParams(stop="a", logit_bias={5: 1, 2: 3.0}, stop_token_ids=[4])
    other = SamplingParams(stop=("a",), logit_bias={2: 3, 5: 1.0}, stop_token_ids=(4,))
    assert one == other and hash(one) == hash(other)
