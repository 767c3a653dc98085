"""Random writes and reads of pages against plain NumPy pages: nothing lands where it should not."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels import Pages, paged_attention, quantize
from tests.oracles import attention as oracle
from tests.pallas_kernels.cases import close

PAGES, SIZE, HEADS, WIDTH, ROWS, PER_ROW = 6, 4, 2, 8, 3, 3
LENGTH = PER_ROW * SIZE
SHAPE = dict(
    num_pages=PAGES, page_size=SIZE, num_kv_heads=HEADS, num_keys=1, num_values=2,
    key_size=WIDTH, value_size=WIDTH,
)  # fmt: skip
# Pages that rows share, entries that are no page, and far more than there are.
tables = st.lists(
    st.integers(-2, PAGES + 1) | st.sampled_from([-(2**31), 2**31 - 1]),
    min_size=ROWS * PER_ROW,
    max_size=ROWS * PER_ROW,
).map(lambda x: np.array(x, np.int32).reshape(ROWS, PER_ROW))
lengths = st.lists(
    st.sampled_from([0, LENGTH]) | st.integers(0, LENGTH), min_size=ROWS, max_size=ROWS
).map(lambda x: np.array(x, np.int32))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def write_by_hand(data, streams, table, positions):
    """Plain pages [pages, K, size, record] after the write, token by token; and slots that two
    tokens of the call claim, which may hold either."""
    data, claims = data.copy(), {}
    for row, i in np.ndindex(positions.shape):
        position = int(positions[row, i])
        if position < 0 or position >= table.shape[1] * SIZE:
            continue
        page, slot = int(table[row, position // SIZE]), position % SIZE
        if not 0 <= page < PAGES:
            continue
        claims[page, slot] = claims.get((page, slot), 0) + 1
        data[page, :, slot] = np.concatenate([x[row, i] for x in streams], axis=-1)
    return data, [at for at, count in claims.items() if count > 1]


write = jax.jit(lambda pages, *x: pages.write((x[0],), x[1:3], *x[3:]))


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    table=tables,
    positions=st.lists(
        st.integers(-3, 2 * LENGTH) | st.sampled_from([-(2**31), 2**31 - 1]),
        min_size=ROWS * 5,
        max_size=ROWS * 5,
    ),
    seed=st.integers(0, 2**16),
)
def test_writes_land_where_they_should_or_nowhere(table, positions, seed):
    positions = np.array(positions, np.int32).reshape(ROWS, 5)
    streams = [normal(seed + i, ROWS, 5, HEADS, WIDTH) for i in range(3)]
    data = normal(seed, PAGES, HEADS, SIZE, 3 * WIDTH)
    want, twice = write_by_hand(data, streams, table, positions)
    pages = Pages(jnp.asarray(data), None, 1, 2, WIDTH, WIDTH)
    got = np.array(write(pages, *map(jnp.asarray, (*streams, table, positions))).data)
    for page, slot in twice:
        got[page, :, slot] = want[page, :, slot] = 0
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_rows_of_any_length_over_shared_and_absent_pages(dtype):
    """What a row reads is what its own pages hold, whoever wrote them; NaN everywhere else."""
    attend = jax.jit(
        functools.partial(paged_attention, implementation="xla", return_residuals=True)
    )
    weights = normal(9, 2, HEADS, WIDTH)

    streams = [jnp.asarray(normal(i, 1, PAGES * SIZE, HEADS, WIDTH)) for i in range(3)]
    slots = jnp.arange(PAGES * SIZE, dtype=jnp.int32)[None]
    identity = jnp.arange(PAGES, dtype=jnp.int32)[None]
    full = Pages.create(**SHAPE, dtype=dtype)
    full = full.write(streams[:1], streams[1:], identity, slots)  # every slot of every page
    if dtype == "int8":
        streams = [quantize(x, dtype).dequantize() for x in streams]
    streams = [np.asarray(x) for x in streams]

    @hypothesis.settings(max_examples=25)
    @hypothesis.given(table=tables, kv_lengths=lengths, shared=st.booleans())
    def holds(table, kv_lengths, shared):
        used = np.arange(PER_ROW) < -(-kv_lengths[:, None] // SIZE)
        table = np.where(used, table.clip(0, PAGES - 1), table)
        if shared:  # a common prefix, as prompts share it
            table[:, 0] = 2
        q = normal(3, ROWS, 2, 4, WIDTH)
        index = table.clip(0, PAGES - 1)[:, :, None] * SIZE + np.arange(SIZE)
        rows = [x[0, index.reshape(ROWS, -1)] for x in streams]
        want = oracle.attention(q, rows[:1], rows[1:], None, weights, {"kv_lengths": kv_lengths})
        held = np.zeros((PAGES, SIZE), bool)
        for b, t in np.ndindex(ROWS, LENGTH):
            if t < kv_lengths[b]:
                held[table[b, t // SIZE], t % SIZE] = True
        mark = lambda x: None if x is None else jnp.where(held[:, None, :, None], x, jnp.nan)  # noqa: E731
        data = full.data if dtype == "int8" else mark(full.data)
        pages = Pages(data, mark(full.scales), 1, 2, WIDTH, WIDTH)
        got = attend(jnp.asarray(q), pages, table, kv_lengths, None, weights)
        jax.tree.map(close, got, want)

    holds()


def test_known_mistakes_are_refused_and_traced_ones_dropped():
    pages = Pages.create(**SHAPE, dtype=jnp.float32)
    x = [jnp.ones((1, 1, HEADS, WIDTH))] * 3
    table = jnp.array([[3, -1]], jnp.int32)
    for position, message in (
        (8, "positions reach 8; page_table has room for 0 to 7"),
        (4, "page_table gives page -1 to a token; pages has 0 to 5"),
    ):
        at = jnp.array([[position]], jnp.int32)
        with pytest.raises(ValueError, match=message):
            pages.write(x[:1], x[1:], table, at)
        assert not write(pages, *x, table, at).data.any()
    assert write(pages, *x, table, jnp.array([[0]], jnp.int32)).data.sum() == 3 * HEADS * WIDTH
