"""The arguments of `attention`: mistakes are one clear line, "auto" falls through refusals."""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import api

Q, KV = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 5, 2, 8))
W = jnp.ones((2, 2, 8))


@pytest.fixture
def without_type_checks():
    """What a user meets: the annotations are only checked in the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Q, KV, (KV,)), {}, "keys must be a non-empty tuple"),
        ((Q, (KV,), ()), {}, "values must be a non-empty tuple"),
        (
            (Q, (KV[0],), (KV,)),
            {},
            r"keys\[0\] has shape \(5, 2, 8\); it must be \[B, S, K, H\]",
        ),
        ((Q, (KV, KV[:, :4]), (KV,), W), {}, r"keys\[1\] has shape .* all keys must"),
        ((Q, (KV,), (KV[:, :4],)), {}, "values have shape"),
        (
            (Q[:, :, :3], (KV,), (KV,)),
            {},
            "q has 3 heads and keys have 2; the second must divide",
        ),
        ((Q[..., :4], (KV,), (KV,)), {}, "B and H must be those of q"),
        ((Q.astype(int), (KV,), (KV,)), {}, "q is int32"),
        ((Q, (KV, KV), (KV,)), {}, "key_weights is None with 2 keys"),
        ((Q, (KV,), (KV, KV), None, W[:, :1]), {}, r"value_weights has shape \(2, 1, 8\)"),
        ((Q, (KV,), (KV,)), {"window": 0}, "window is 0; it must be at least 1"),
        ((Q, (KV,), (KV,)), {"softcap": -1.0}, "softcap is -1.0; it must be positive"),
        ((Q, (KV,), (KV,)), {"kv_lengths": np.ones(3, int)}, r"kv_lengths has shape \(3,\)"),
        ((Q, (KV,), (KV,)), {"kv_lengths": np.ones(2)}, "kv_lengths is float"),
        ((Q, (KV,), (KV,)), {"q_segment_ids": np.ones((2, 3), int)}, "kv_segment_ids is None"),
        ((Q, (KV,), (KV,)), {"implementation": "xIa"}, "did you mean 'xla'"),
    ],
)
def test_mistakes_are_named(arguments, options, message, without_type_checks):
    with pytest.raises(ValueError, match=message) as error:
        pallas_kernels.attention(*arguments, **options)
    assert "\n" not in str(error.value)


def test_a_refusal_falls_through_under_auto_and_is_loud_when_named(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("needs a device")

    monkeypatch.setattr(api, "_IMPLEMENTATIONS", {"far": refuse, **api._IMPLEMENTATIONS})
    assert pallas_kernels.implementations() == ("far", "xla", "reference")
    assert pallas_kernels.attention(Q, (KV,), (KV,)).shape == Q.shape
    with pytest.raises(NotImplementedError, match="needs a device"):
        pallas_kernels.attention(Q, (KV,), (KV,), implementation="far")


def test_residuals_are_returned_on_request():
    out, lse = pallas_kernels.attention(Q, (KV,), (KV,), scale=0.0, return_residuals=True)
    np.testing.assert_allclose(out, Q)
    # Queries are the last three of five positions and see 3, 4 and 5 keys.
    np.testing.assert_allclose(lse[0, :, 0], jnp.log(jnp.arange(3.0, 6.0)), rtol=1e-6)
