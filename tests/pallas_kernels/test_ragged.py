"""`ragged_attention`'s arguments, and which queries are whose."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PagedStream, RaggedRows, ragged_attention
from tests.pallas_kernels.cases import I32

TABLE = jnp.asarray(I32([[5, 0, 3], [2, 6, 1]]))
STREAM = PagedStream(jnp.zeros((2, 7, 4, 2 * 8)), 1, TABLE, 8)
ROWS = RaggedRows(*map(I32, ([0, 1], [1, 4], [9, 6])))
Q = jnp.zeros((6, 4, 8))


def test_rows_in_any_order_own_their_queries_and_are_cut_into_blocks():
    rows = RaggedRows(*(jnp.asarray(I32(x)) for x in ([7, 0, 1, 9], [1, 0, 5, 2], [4, 3, 9, 2])))
    row, index = rows.owners(12)
    assert row.tolist() == [-1, 2, 2, 2, 2, 2, -1, 0, -1, 3, 3, -1]
    assert index[np.asarray(row) >= 0].tolist() == [0, 1, 2, 3, 4, 0, 0, 1]
    blocks = rows.blocks(12, 2)
    used = int(blocks.firsts[-1])
    assert blocks.firsts.tolist() == [0, 1, 1, 4, 5]
    assert [x[:used].tolist() for x in blocks[:4]] == [
        [0, 2, 2, 2, 3], [7, 1, 3, 5, 9], [1, 2, 2, 1, 2], [3, 4, 6, 8, 0],
    ]  # fmt: skip
    assert (blocks.counts[used:] == 0).all()


def test_scales_of_heads_in_groups_and_padded_are_those_of_their_heads():
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(-9, 9, (2, 7, 4, 6 * 8)), jnp.int8)
    scale = rng.uniform(1, 2, (2, 7, 4, 6)).astype(np.float32)
    grouped = scale.reshape(2, 7, 4, 3, 2).swapaxes(2, 3).reshape(2, 7, 3, 8)
    grouped = jnp.asarray(np.pad(grouped, ((0, 0),) * 3 + ((0, 5),), constant_values=np.nan))
    table = np.asarray(TABLE)
    found = PagedStream(codes, 1, TABLE, 8, grouped).read()
    np.testing.assert_array_equal(found.scale, scale[1, table].reshape(2, 12, 6, 1))
    np.testing.assert_array_equal(found.data, codes[1, table].reshape(2, 12, 6, 8))


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": dataclasses.replace(ROWS, counts=I32([1, 6]))}, "row 1 has places 1 to 6; q has"),
        ({"rows": dataclasses.replace(ROWS, counts=I32([2, 4]))}, "two rows the same place"),
        ({"rows": dataclasses.replace(ROWS, counts=I32([-1, 4]))}, "counts holds -1"),
        ({"rows": dataclasses.replace(ROWS, lengths=I32([9, 13]))}, "has room for 12 tokens"),
        ({"rows": dataclasses.replace(ROWS, starts=I32([0]))}, r"rows.starts has shape \(1,\)"),
        ({"rows": dataclasses.replace(ROWS, lanes=((1, 1), (1, 4)))}, "2 rows and 6 places in all"),
        ({"rows": ROWS.counts}, "it must be a RaggedRows"),
        ({"keys": (jnp.zeros((2, 12, 2, 8)),)}, "keys are not all PagedStream"),
        ({"values": (dataclasses.replace(STREAM, table=TABLE + 1),)}, "different tables"),
        (
            {"values": (dataclasses.replace(STREAM, scale=jnp.ones((2, 7, 4, 2))),)},
            r"values\[0\].scale has shape \(2, 7, 4, 2\); it must be \(2, 7, G, W\), of G groups",
        ),
        ({"q": Q[None]}, r"it must be \[T, N, H\]"),
        ({"keys": (STREAM, STREAM)}, "key_weights is None with 2 keys"),
        ({"implementation": "cudnn"}, "has no ragged_attention"),
    ],
)
def test_mistakes_are_named(changes, message):
    arguments = dict(q=Q, keys=(STREAM,), values=(STREAM,), rows=ROWS)
    with pytest.raises((ValueError, NotImplementedError), match=message) as error:
        ragged_attention(**(arguments | changes))
    assert "\n" not in str(error.value)
