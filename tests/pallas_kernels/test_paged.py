"""Pages: what is written where, and the arguments of `paged_attention`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Pages, paged_attention
from pallas_kernels.reference import gather

FIELDS = dict(
    num_pages=7, page_size=4, num_kv_heads=2, num_keys=2, num_values=1, key_size=8, value_size=6
)
TABLE = jnp.array([[5, 0, 3], [2, 6, 1]], jnp.int32)


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_tokens_land_in_their_slots_and_streams_are_written_separately():
    pages = Pages.create(**FIELDS, dtype=jnp.float32)
    key, other, value = draw(2, 12, 2, 8), 2 * draw(2, 12, 2, 8), draw(2, 12, 2, 6)
    first = jnp.where(jnp.arange(12) < jnp.array([[12], [5]]), jnp.arange(12), -1)
    pages = pages.write((key, None), (value,), TABLE, first)
    pages = pages.write((None, other), (None,), TABLE, first)
    keys, values = gather(pages, TABLE)
    for found, wanted in ((keys[0], key), (keys[1], other), (values[0], value)):
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1, :5], wanted[1, :5])
        assert (found[1, 5:] == 0).all()
    assert (pages.data[4] == 0).all()  # in nobody's table
    assert (pages.data[TABLE[0, 1], :, 2, :8] == key[0, 6]).all()
    assert pages.nbytes == 7 * 2 * 4 * (2 * 8 + 6) * 4


def test_eight_bit_pages_scale_every_token_and_stream():
    pages = Pages.create(**FIELDS, dtype="int8")
    key = draw(2, 3, 2, 8) * jnp.array([1, 1e3, 1e-3])[None, :, None, None]
    at = jnp.broadcast_to(jnp.arange(3), (2, 3))
    found = gather(pages.write((key, -key), (None,), TABLE, at), TABLE)[0]
    np.testing.assert_allclose(found[0][:, :3], key, rtol=0, atol=float(jnp.abs(key).max()) / 254)
    size = jnp.abs(key).max(-1, keepdims=True)
    assert (jnp.abs(found[0][:, :3] - key) <= size / 254 * 1.001).all()
    np.testing.assert_array_equal(found[1], -found[0])


PAGES = Pages.create(**FIELDS, dtype=jnp.float32)
Q, LENGTHS = jnp.ones((2, 1, 4, 8)), jnp.array([9, 3], jnp.int32)
W, W2 = jnp.ones((2, 2, 8)), None


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_table": TABLE.at[0, 2].set(7)}, "page_table points to page 7; pages has 0 to 6"),
        ({"page_table": TABLE.at[1, 0].set(-1)}, "page_table points to page -1"),
        ({"page_table": TABLE[0]}, r"page_table has shape \(3,\)"),
        ({"page_table": TABLE.astype(float)}, "page_table is float32; it must be an integer"),
        ({"kv_lengths": LENGTHS + 4}, "kv_lengths reach from 7 to 13; page_table has room for 0"),
        ({"kv_lengths": LENGTHS[:1]}, r"kv_lengths has shape \(1,\)"),
        ({"q": Q[..., :4]}, "pages have B = 2 and H = 8; they must be those of q, 2 and 4"),
        ({"q": Q[:, :, :3]}, "q has 3 heads and pages have 2"),
        ({"key_weights": None}, "key_weights is None with 2 keys"),
        ({"value_weights": W}, r"value_weights has shape .* \[J, K, H\] = \(1, 2, 6\), or None"),
        ({"window": 0}, "window is 0"),
        ({"pages": PAGES.data}, "it must be a Pages"),
        ({"pages": Pages(PAGES.data, None, 2, 2, 8, 6)}, r"page_size, 28\]"),
        ({"pages": Pages(PAGES.data.astype("int8"), None, 2, 1, 8, 6)}, "int8 data needs scales"),
        ({"implementation": "cudnn"}, "has no paged_attention"),
    ],
)
def test_mistakes_are_named(changes, message):
    arguments = dict(
        q=Q, pages=PAGES, page_table=TABLE, kv_lengths=LENGTHS, key_weights=W, value_weights=None
    )
    with pytest.raises((ValueError, NotImplementedError), match=message) as error:
        paged_attention(**(arguments | changes))
    assert "\n" not in str(error.value)


def test_entries_that_no_token_reaches_may_point_anywhere():
    want = paged_attention(Q, PAGES, TABLE, LENGTHS, W)
    got = paged_attention(Q, PAGES, TABLE.at[1, 1:].set(99), LENGTHS, W)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("implementation", ["xla", "tpu", "triton"])
@pytest.mark.parametrize("sizes", [(2, 0, 3), (2, 1, 0), (0, 1, 3)])
def test_what_has_no_queries_or_pages_is_zero(sizes, implementation):
    batch, length, width = sizes
    q, table, lengths = jnp.ones((batch, length, 4, 8)), TABLE[:batch, :width], LENGTHS[:batch] * 0
    out, lse = paged_attention(
        q, PAGES, table, lengths, W, implementation=implementation, return_residuals=True
    )
    assert out.shape == (batch, length, 4, 6) and lse.shape == (batch, length, 4)
    assert (out == 0).all() and (lse == -jnp.inf).all()


def test_gradients_are_refused():
    with pytest.raises(NotImplementedError, match="pages cannot be differentiated"):
        jax.grad(lambda q: paged_attention(q, PAGES, TABLE, LENGTHS, W).sum())(Q)
