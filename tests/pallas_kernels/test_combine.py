"""Parts of the keys merge into all of them, parts that see nothing included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels


def parts():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return [(draw(2, 3, 4, 8), draw(2, 3, 4)) for _ in range(3)]


def test_values_are_the_softmax_over_the_parts():
    outs, lses = map(np.stack, zip(*parts(), strict=True))
    share = np.exp(lses) / np.exp(lses).sum(0)
    out, lse = pallas_kernels.combine(parts())
    np.testing.assert_allclose(out, (share[..., None] * outs).sum(0), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(lse, np.log(np.exp(lses).sum(0)), rtol=2e-5, atol=2e-6)


def test_blind_parts_do_not_count_and_none_at_all_gives_zero():
    (out, lse), *_ = parts()
    blind = (jnp.full_like(out, jnp.nan), jnp.full_like(lse, -jnp.inf))
    merged = pallas_kernels.combine([blind, (out, lse), blind])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), merged, (out, lse))
    out, lse = pallas_kernels.combine([blind, blind])
    assert (out == 0).all() and jnp.isneginf(lse).all()
    gradient = jax.grad(lambda x: pallas_kernels.combine([(x, lse), (x, lse)])[0].sum())(out)
    assert (gradient == 0).all()


def test_large_scores_do_not_overflow():
    (out, lse), *_ = parts()
    merged = pallas_kernels.combine([(out, lse + 1e4), (2 * out, lse + 1e4)])
    np.testing.assert_allclose(merged[0], 1.5 * out, rtol=1e-5)
    np.testing.assert_allclose(merged[1], lse + 1e4 + np.log(2), rtol=1e-6)


def test_mistakes_are_named():
    (out, lse), *_ = parts()
    with pytest.raises(ValueError, match="parts is empty"):
        pallas_kernels.combine([])
    with pytest.raises(ValueError, match=r"parts\[1\] has shapes"):
        pallas_kernels.combine([(out, lse), (out[:1], lse[:1])])
