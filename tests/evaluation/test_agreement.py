"""KL, top-1 agreement, exact matches and losses against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from fusedkv_jax.evaluation import agreement, exact_matches
from fusedkv_jax.evaluation.agreement import losses


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def logits():
    rng = np.random.default_rng(0)
    return (3 * rng.normal(size=(2, 4, 7, 11))).astype(np.float32)


def test_against_numpy(logits):
    reference, other = logits
    mask = np.random.default_rng(1).integers(0, 2, (4, 7))
    p, q = softmax(reference.astype(np.float64)), softmax(other.astype(np.float64))
    kl = (p * np.log(p / q)).sum(-1)
    same = reference.argmax(-1) == other.argmax(-1)
    found = agreement(jnp.asarray(reference), jnp.asarray(other), mask)
    assert found.places == mask.sum()
    assert found.kl == pytest.approx(kl[mask > 0].mean(), rel=1e-5)
    assert found.top1 == pytest.approx(same[mask > 0].mean())
    assert agreement(jnp.asarray(reference), jnp.asarray(other)).kl == pytest.approx(kl.mean())
    total, count = losses(jnp.asarray(other), np.full((4, 7), 3), mask)
    assert count == mask.sum()
    assert total == pytest.approx(-np.log(q[..., 3])[mask > 0].sum(), rel=1e-5)


def test_a_run_agrees_with_itself(logits):
    found = agreement(jnp.asarray(logits[0]), jnp.asarray(logits[0]))
    assert (found.kl, found.top1) == (0.0, 1.0)
    excluded = jnp.asarray(logits[0]).at[..., 2].set(-jnp.inf)
    assert agreement(excluded, jnp.asarray(logits[0])).kl > 0  # finite, though log 0 is not


def test_exact_matches_want_every_token():
    tokens = np.array([[1, 2, 3, 4], [5, 6, 7, 0]])
    answers = np.array([[0, 1, 1, 2], [1, 2, 2, 0]])
    right = jnp.asarray(np.eye(8, dtype=np.float32)[tokens])
    assert exact_matches(right, tokens, answers) == (4, 4)
    wrong = np.array(tokens)
    wrong[0, 2] = 0  # one token of the first row's first answer
    wrong[1, 3] = 1  # not part of an answer
    assert exact_matches(jnp.asarray(np.eye(8, dtype=np.float32)[wrong]), tokens, answers) == (3, 4)


@pytest.mark.usefixtures("without_type_checks")
def test_shapes_are_the_same_and_not_only_alike(logits):
    """Broadcasting would count a place once and its divergence four times."""
    one, tokens = jnp.asarray(logits[0]), np.zeros((4, 7), int)
    for shape in ((7,), (1, 7), (4, 1), (4, 7, 1)):
        found = str(shape).replace("(", r"\(").replace(")", r"\)")
        for call in (
            lambda mask: agreement(one, one, mask),
            lambda mask: losses(one, tokens, mask),
            lambda mask: losses(one, mask.astype(int), tokens + 1),
            lambda mask: exact_matches(one, mask.astype(int), tokens + 1),
            lambda mask: exact_matches(one, tokens, mask.astype(int)),
        ):
            with pytest.raises(ValueError, match=rf"has shape {found}; use \(4, 7\)"):
                call(np.ones(shape))
    with pytest.raises(ValueError, match=r"other has shape \(1, 7, 11\); use \(4, 7, 11\)"):
        agreement(one, one[:1])


def test_nothing_to_compare(logits):
    with pytest.raises(ValueError, match="mask selects no place"):
        agreement(jnp.asarray(logits[0]), jnp.asarray(logits[1]), np.zeros((4, 7)))
