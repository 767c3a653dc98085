"""The arguments of `attention`: mistakes are one clear line, "auto" falls through refusals."""

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels

Q, KV = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 5, 2, 8))
W = jnp.ones((2, 2, 8))


@pytest.mark.usefixtures("without_type_checks")
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
        (
            (Q[..., :4], (KV,), (KV,)),
            {},
            "keys have B = 2 and H = 8; they must be those of q, 2 and 4",
        ),
        ((Q.astype(int), (KV,), (KV,)), {}, "q is int32"),
        ((Q, (KV, KV), (KV,)), {}, "key_weights is None with 2 keys"),
        (
            (Q, (KV,), (KV,), W),
            {},
            r"key_weights has shape \(2, 2, 8\); with 1 keys it must be .* \(1, 2, 8\), or None",
        ),
        ((Q, (KV.astype(int),), (KV,)), {}, r"keys\[0\] is int32; it must be a float array or Q"),
        ((Q, (KV,), (KV, KV), None, W[:, :1]), {}, r"value_weights has shape \(2, 1, 8\)"),
        ((Q, (KV,), (KV,)), {"window": 0}, "window is 0; it must be a whole number of at least 1"),
        ((Q, (KV,), (KV,)), {"softcap": -1.0}, "softcap is -1.0; it must be positive"),
        ((Q, (KV,), (KV,)), {"kv_lengths": np.ones(3, int)}, r"kv_lengths has shape \(3,\)"),
        ((Q, (KV,), (KV,)), {"kv_lengths": np.ones(2)}, "kv_lengths is float"),
        ((Q, (KV,), (KV,)), {"q_segment_ids": np.ones((2, 3), int)}, "kv_segment_ids is None"),
        ((Q, (KV,), (KV,)), {"implementation": "xIa"}, "did you mean 'xla'"),
    ],
)
def test_mistakes_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message) as error:
        pallas_kernels.attention(*arguments, **options)
    assert "\n" not in str(error.value)


def test_one_source_may_be_scaled():
    """Layouts with one learned source pass [1, K, H]."""
    weight = jnp.arange(16.0).reshape(1, 2, 8)
    scaled = pallas_kernels.attention(Q, (KV,), (KV,), weight, weight)
    rebuilt = pallas_kernels.attention(Q, (weight[0] * KV,), (weight[0] * KV,))
    np.testing.assert_allclose(scaled, rebuilt, rtol=1e-6)


def test_residuals_are_returned_on_request():
    out, lse = pallas_kernels.attention(Q, (KV,), (KV,), scale=0.0, return_residuals=True)
    np.testing.assert_allclose(out, Q)
    # Queries are the last three of five positions and see 3, 4 and 5 keys.
    np.testing.assert_allclose(lse[0, :, 0], jnp.log(jnp.arange(3.0, 6.0)), rtol=1e-6)
