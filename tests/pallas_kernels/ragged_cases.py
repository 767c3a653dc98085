"""The tests that every implementation passes for steps of chunks and single tokens over pages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import PagedStream, RaggedRows, quantize
from tests.oracles import ragged as oracle
from tests.pallas_kernels.cases import I32, close
from tests.pallas_kernels.fuzz import jit
from tests.pallas_kernels.implementation import Implementation


@dataclasses.dataclass(frozen=True)
class Step:
    """A step: of each row how many queries and tokens, and what attends.

    Attributes:
      counts, lengths: of each row.
      heads: query heads N and KV heads K.
      sizes: head sizes H and H'.
      sources: J and J'.
      page_size: tokens of a page.
      dtype: storage.
      shared: pages that all rows begin with, as far as they reach.
      strewn: share of entries that name any page of the step.
      pad: of the scales of a page.
      tile: tokens of a tile of a page; 0 for pages in one piece.
      lanes: hint; () for rows anywhere, in any order.
      options: window, scale, softcap.
    """

    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    heads: tuple[int, int] = (4, 2)
    sizes: tuple[int, int] = (16, 16)
    sources: tuple[int, int] = (1, 1)
    page_size: int = 16
    dtype: str = "float32"
    shared: int = 0
    strewn: float = 0
    pad: int = 0
    tile: int = 0
    lanes: tuple[tuple[int, int], ...] = ()
    options: tuple[tuple[str, float], ...] = ()


STEPS = {
    "mixed": Step((1, 37, 1, 5, 0, 70), (20, 37, 3, 44, 9, 96), sources=(2, 2), shared=1),
    "lanes": Step(
        (1, 0, 1, 16, 11), (30, 0, 1, 16, 40), (8, 1), sources=(2, 1), lanes=((3, 1), (2, 16)),
        options=(("window", 9),),
    ),
    "int8": Step(
        (1, 19, 1), (33, 19, 7), (6, 2), (16, 24), (1, 3), 8, "int8", shared=1,
        options=(("softcap", 2.0), ("window", 9)),
    ),
    "tiles": Step((1, 19, 1), (70, 19, 7), (4, 2), page_size=32, dtype="int8", tile=8),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Made:
    """Arguments of a call, and what their streams hold, [R, S, K, H] each."""

    q: np.ndarray
    keys: tuple[PagedStream, ...]
    values: tuple[PagedStream, ...]
    rows: RaggedRows
    weights: tuple[np.ndarray | None, np.ndarray | None]
    exact: tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]


def _places(rng, step):
    """(starts, T): rows in any order, with places of no row between them."""
    if step.lanes:
        rows = RaggedRows.in_lanes(
            step.lanes, *map(jnp.asarray, map(I32, (step.counts, step.lengths)))
        )
        return np.asarray(rows.starts), sum(n * columns for n, columns in step.lanes)
    starts, place = np.zeros(len(step.counts), int), 0
    for row in rng.permutation(len(step.counts)):
        place += int(rng.integers(0, 3))
        starts[row] = place
        place += step.counts[row]
    return starts, place + int(rng.integers(0, 3))


@functools.partial(jit, static_argnums=1)  # plain code makes NaN of some float8_e4m3b11fnuz
def _stored(numbers, dtype):
    """Codes, and what they stand for."""
    codes = quantize(numbers, dtype)
    return codes, codes.dequantize()


def make(step: Step, seed: int = 0) -> Made:
    """Random numbers where tokens are, NaN (or spoiled scales) where none is, bad page numbers in
    entries that no token reaches."""
    rng = np.random.default_rng(seed)
    (num, heads), size, num_rows = step.heads, step.page_size, len(step.counts)
    lengths = np.array(step.lengths)
    width = max(1, -(-int(lengths.max()) // size))
    starts, total = _places(rng, step)
    table = 1 + rng.permutation(num_rows * width).reshape(num_rows, width)
    table[:, : step.shared] = table[0, : step.shared]
    table = np.where(rng.random(table.shape) < step.strewn, rng.permuted(table), table)
    used = np.arange(width) < -(-lengths[:, None] // size)
    num_pages = num_rows * width + 2
    present = np.zeros((num_pages, size), bool)
    for row, length in enumerate(lengths):
        at = np.arange(length)
        present[table[row, at // size], at % size] = True
    given = np.where(used, table, rng.choice([-1, num_pages, 10**6], table.shape))

    def side(count, head_size):
        """Streams in slots of one pool, in descending order, and their numbers."""
        numbers = rng.normal(size=(count + 1, num_pages, size, heads, head_size))
        numbers, scale = jnp.asarray(numbers, jnp.float32), None
        keep = present[None, :, :, None, None]
        if step.dtype == "float32":
            data = jnp.where(keep, numbers, jnp.nan)
        else:
            codes, numbers = _stored(numbers, step.dtype)
            data = codes.data
            scale = jnp.where(keep[..., 0], codes.scale[..., 0], jnp.nan)
            scale = scale.reshape(count + 1, num_pages, 1, size * heads)
            scale = jnp.pad(scale, ((0, 0),) * 3 + ((0, step.pad),), constant_values=9)
        tiles = (size // step.tile, step.tile) if step.tile else (size,)
        data = data.reshape(count + 1, num_pages, *tiles, heads * head_size)
        slots = range(count, 0, -1)
        streams = tuple(
            PagedStream(data, s, jnp.asarray(I32(given)), head_size, scale) for s in slots
        )
        rowwise = np.asarray(numbers)[:, table].reshape(count + 1, num_rows, -1, heads, head_size)
        return streams, tuple(rowwise[s] for s in slots)

    weights = tuple(
        rng.normal(size=(count, heads, head_size)).astype(np.float32) if count > 1 else None
        for count, head_size in zip(step.sources, step.sizes, strict=True)
    )
    (keys, exact_keys), (values, exact_values) = map(side, step.sources, step.sizes)
    q = rng.normal(size=(total, num, step.sizes[0])).astype(np.float32)
    rows = RaggedRows(*map(I32, (starts, step.counts, step.lengths)), step.lanes)
    return Made(q, keys, values, rows, weights, (exact_keys, exact_values))


def expected(step: Step, made: Made):
    """(out, lse), by the definition."""
    rows = zip(np.asarray(made.rows.starts), step.counts, step.lengths, strict=True)
    return oracle.attention(made.q, made.exact, made.weights, rows, **dict(step.options))


class RaggedCases(Implementation):
    """`ragged_attention`; see `Implementation` for what a subclass sets."""

    ragged: tuple[str, ...] = tuple(STEPS)

    def choices(self):
        return {"step": self.ragged}

    def check_ragged(self, step: Step, seed: int = 0):
        """The step's result, and what computes it."""
        made = make(step, seed)

        @jax.jit
        def call(q, keys, values, rows, weights):
            return self.attend_ragged(q, keys, values, rows, *weights, dict(step.options))

        run = lambda rows: call(made.q, made.keys, made.values, rows, made.weights)  # noqa: E731
        got = run(made.rows)
        jax.tree.map(lambda x, y: close(x, y, self.paged_tolerance), got, expected(step, made))
        return made, got, run

    def test_a_step_matches_the_definition(self, step):
        self.check_ragged(STEPS[step])


class RaggedKernelCases(RaggedCases):
    """The same of what has schedules of its own."""

    chunks = 20  # queries of a row in random steps

    def test_a_row_gives_the_same_whoever_else_is_in_the_step(self):
        """Bit for bit: chunks alone, then single tokens alone."""
        made, got, run = self.check_ragged(STEPS["mixed"])
        rows, single = made.rows, np.asarray(made.rows.counts) == 1
        owner = np.asarray(rows.owners(len(made.q))[0])
        for kept in (single, ~single):
            alone = run(dataclasses.replace(rows, counts=np.where(kept, rows.counts, 0)))
            there = (owner >= 0) & kept[owner]
            for part, whole in zip(alone, got, strict=True):
                np.testing.assert_array_equal(part[there], whole[there])
                assert not np.isfinite(part[~there]).any() or (part[~there] == 0).all()

    def test_random_steps(self):
        """Lengths 0 and full, shared and absent pages, chunks of one token and of many."""

        @settings(max_examples=self.examples, deadline=None, derandomize=True, database=None)
        @given(st.data())
        def check(data):
            rows = data.draw(st.integers(1, 5), label="rows")
            few = st.one_of(st.just(1), st.integers(0, self.chunks))
            counts = tuple(data.draw(st.lists(few, min_size=rows, max_size=rows), label="counts"))
            cached = st.one_of(st.just(0), st.just(64), st.integers(0, 70))
            before = data.draw(st.lists(cached, min_size=rows, max_size=rows), label="cached")
            groups, heads = data.draw(st.sampled_from([(1, 2), (4, 2), (3, 1), (8, 1)]))
            sources = data.draw(st.sampled_from([(1, 1), (2, 2)]), label="sources")
            window = data.draw(st.sampled_from([None, 1, 17]), label="window")
            step = Step(
                counts, tuple(x + y for x, y in zip(counts, before, strict=True)),
                (groups * heads, heads), sources=sources, shared=data.draw(st.integers(0, 2)),
                dtype=data.draw(st.sampled_from(["float32", "int8"]), label="dtype"),
                page_size=data.draw(st.sampled_from([8, 16]), label="page size"),
                options=(("window", window),) if window else (),
            )  # fmt: skip
            self.check_ragged(step, data.draw(st.integers(0, 99), label="seed"))

        check()
