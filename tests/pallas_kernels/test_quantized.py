"""What `quantize` stores: errors bounded by the format, bytes, slices, and clear refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Quantized, quantize

# format: the largest relative rounding of a code's own number, or None where codes are integers
FORMATS = {
    "int8": None,
    "float8_e4m3fn": 2**-4,
    "float8_e5m2": 2**-3,
    "float8_e4m3b11fnuz": 2**-4,
    "int4": None,
}


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("groups", [(1, 16), (8, 1), (4, 8)], ids=str)
def test_every_number_is_as_close_as_its_format_allows(dtype, groups):
    tokens, channels = groups
    x = draw(2, 24, 3, 16)
    x = x.at[0, 5].set(0).at[1, :8].set(2.5)  # groups of zeros, and of equal numbers
    stored = quantize(x, dtype, token_group=tokens, channel_group=channels)
    error = np.abs(np.asarray(stored.dequantize() - x))
    step = np.repeat(np.repeat(stored.scale, tokens, axis=1), channels, axis=3)
    relative = FORMATS[dtype]
    allowed = step / 2 if relative is None else np.maximum(relative * np.abs(x), step * 2**-6)
    assert (error <= allowed * (1 + 1e-4) + 1e-6).all()
    assert error.max() > 0 and stored.shape == x.shape
    assert (stored.token_group, stored.channel_group) == groups


def test_the_largest_numbers_of_a_group_are_kept():
    x = draw(1, 4, 1, 8)
    for dtype in FORMATS:
        stored = quantize(x, dtype).dequantize()
        largest = jnp.abs(x).argmax(-1, keepdims=True)
        pick = lambda y, at=largest: jnp.take_along_axis(y, at, axis=-1)  # noqa: E731
        np.testing.assert_allclose(pick(stored), pick(x), rtol=1e-5)


def test_two_codes_share_a_byte_half_and_half():
    codes = jnp.arange(8).reshape(1, 1, 1, 8)
    stored = quantize(codes.astype(jnp.float32) * 15 / 7, "int4")
    first = np.asarray(stored.data)[0, 0, 0]
    assert stored.data.dtype == jnp.uint8 and first.shape == (4,)
    np.testing.assert_array_equal(first & 15, np.round(np.arange(4) * 15 / 7))
    np.testing.assert_array_equal(first >> 4, np.round(np.arange(4, 8) * 15 / 7))


@pytest.mark.parametrize(("dtype", "tokens", "channels"), [("int8", 1, None), ("int4", 8, 1)])
def test_slices_layers_and_bytes(dtype, tokens, channels):
    x = draw(3, 2, 32, 2, 16)  # a leading axis of layers
    stored = quantize(x, dtype, token_group=tokens, channel_group=channels)
    layer = jax.tree.map(lambda leaf: leaf[1], stored)
    part = jax.jit(lambda s, start: s.tokens(start, 16))(layer, 8)
    np.testing.assert_array_equal(part.dequantize(), stored.dequantize()[1, :, 8:24])
    groups = x.size // tokens // (channels or 16)
    per_group = 4 if dtype == "int8" else 8
    assert stored.nbytes == x.size * stored.bits // 8 + groups * per_group


def test_gradients_are_refused():
    q, key = draw(1, 2, 2, 8), quantize(draw(1, 4, 2, 8))

    def loss(q):
        return pallas_kernels.attention(q, (key,), (key,)).sum()

    assert np.isfinite(loss(q))
    with pytest.raises(NotImplementedError, match="a Quantized source cannot be differentiated"):
        jax.grad(loss)(q)


GOOD = quantize(draw(1, 4, 2, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quantize(draw(1, 4, 2, 8), "int7"), "dtype is 'int7'; it must be one of int8"),
        (
            lambda: quantize(draw(1, 4, 2, 8), token_group=3),
            "token_group is 3; it must divide S = 4",
        ),
        (lambda: quantize(draw(1, 4, 2, 7), "int4"), "x has H = 7; int4 packs two"),
        (lambda: Quantized(GOOD.data.astype(jnp.int16), GOOD.scale), r"keys\[0\].data is int16"),
        (lambda: Quantized(GOOD.data, GOOD.scale[:, :3]), r"keys\[0\].scale has shape"),
        (lambda: Quantized(GOOD.data, GOOD.scale, GOOD.scale[:, :2]), r"keys\[0\].zero has shape"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message) as error:
        pallas_kernels.attention(draw(1, 1, 2, 8), (make(),), (GOOD,))
    assert "\n" not in str(error.value)
