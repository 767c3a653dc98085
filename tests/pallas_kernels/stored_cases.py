"""The tests that every implementation passes for caches in 8 or 4 bits, and in pages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Pages, Quantized, quantize
from tests.oracles import attention as oracle
from tests.pallas_kernels.cases import I32, close, draw
from tests.pallas_kernels.implementation import Implementation

# name: (shape as in CASES, page size, options)
PAGED = {
    "one_token": ((3, 1, 48, 6, 2, 16, 16, 2, 2), 16, {"kv_lengths": I32([48, 17, 0])}),
    "plain": ((2, 1, 24, 4, 4, 64, 64, 1, 1), 8, {"kv_lengths": I32([8, 23])}),
    "two_tokens": ((2, 2, 40, 3, 3, 16, 16, 2, 2), 8, {"kv_lengths": I32([33, 2])}),
    "window": ((2, 1, 64, 8, 1, 16, 16, 2, 2), 8, {"kv_lengths": I32([60, 5]), "window": 9}),
    "chunk": ((2, 7, 32, 4, 2, 16, 16, 2, 2), 16, {"kv_lengths": I32([31, 7])}),
    "uneven": ((1, 3, 32, 4, 2, 16, 24, 1, 3), 8, {"kv_lengths": I32([29]), "softcap": 2.0}),
    "heads_of_128": ((1, 1, 32, 8, 1, 128, 128, 2, 2), 16, {"kv_lengths": I32([30])}),
}
# (format of keys, its groups), (format of values, its groups)
EIGHT_AND_EIGHT = ({}, {})
KIVI = ({"token_group": 8, "channel_group": 1}, {"token_group": 1, "channel_group": 8})


def spoil(source: Quantized, options) -> Quantized:
    """The same with scales of NaN, and codes of all ones, for every absent token."""
    group = source.token_group
    shape = source.shape
    keep = [[oracle.present(b, s, options) for s in range(shape[1])] for b in range(shape[0])]
    tokens = np.array(keep)[..., None, None]
    groups = tokens.reshape(shape[0], -1, group, 1, 1).any(2)
    data = np.asarray(source.data)
    codes = np.where(tokens, data.view(np.uint8), np.uint8(255)).view(data.dtype)
    number = lambda x: None if x is None else jnp.where(groups, x, jnp.nan)  # noqa: E731
    return Quantized(jnp.asarray(codes), number(source.scale), number(source.zero))


class QuantizedCases(Implementation):
    """`Quantized` keys and values; see `Implementation` for what a subclass sets."""

    def check(self, sources, exact, rest, options, tolerance):
        (q, weights), (keys, values) = rest, sources
        got = jax.jit(lambda *x: self.attend(x, options))(q, keys, values, *weights)
        want = oracle.attention(q, *exact, *weights, options)
        close(got[0], want[0], tolerance)
        if "residuals" not in self.unsupported:
            close(got[1], want[1], tolerance)

    def both(self, format, shape, options, tolerance):
        (q, keys, values, *weights), _ = draw(format, shape)
        groups = KIVI if format == "int4" else EIGHT_AND_EIGHT

        @jax.jit  # one small program instead of one for each operation
        def store(sides):
            stored = [
                tuple(quantize(x, format, **group) for x in side)
                for side, group in zip(sides, groups, strict=True)
            ]
            return stored, [[x.dequantize() for x in side] for side in stored]

        sources, exact = store((keys, values))
        spoiled = [tuple(spoil(x, options) for x in side) for side in sources]
        self.check(spoiled, exact, (q, weights), options, tolerance)

    def test_one_token_reads_stored_codes(self, format):
        options = {"kv_lengths": I32([40, 17, 0])}
        self.both(format, (3, 1, 40, 6, 2, 16, 16, 2, 2), options, self.quantized_tolerance)

    def test_many_tokens_read_stored_codes(self, format):
        options = {"kv_lengths": I32([48, 30]), "window": 20}
        self.skip_without("window")
        self.both(format, (2, 30, 48, 4, 2, 16, 16, 2, 2), options, self.quantized_tolerance)


class PagedCases(Implementation):
    """`paged_attention`; see `Implementation` for what a subclass sets."""

    paged: tuple[str, ...] = tuple(PAGED)

    def choices(self):
        formats = [x for x in super().choices()["format"] if x != "int4"]
        able = [name for name in self.paged if not self._needs(name) & self.unsupported]
        return {"paged_case": able, "format": formats}

    @staticmethod
    def _needs(name):
        shape, _, options = PAGED[name]
        found = {word for word in ("window", "softcap") if word in options}
        found |= {"value_size"} if shape[5] != shape[6] else set()
        return found | ({"chunk"} if shape[1] > 1 else set())

    def build(self, name, dtype):
        """Arguments with shuffled pages, NaN wherever no token is, and what is stored in them."""
        shape, page_size, options = PAGED[name]
        (q, keys, values, *weights), _ = draw(name, shape)
        batch, length, heads = keys[0].shape[:3]
        per_row = length // page_size
        pages = Pages.create(
            num_pages=batch * per_row + 3, page_size=page_size, num_kv_heads=heads,
            num_keys=len(keys), num_values=len(values), key_size=shape[5], value_size=shape[6],
            dtype=dtype,
        )  # fmt: skip
        nan = lambda x: None if x is None else jnp.full_like(x, jnp.nan)  # noqa: E731
        integer = jnp.issubdtype(pages.data.dtype, jnp.integer)
        data = pages.data if integer else nan(pages.data)
        pages = Pages(data, nan(pages.scales), len(keys), len(values), shape[5], shape[6])
        rng = np.random.default_rng(0)
        table = rng.permutation(pages.num_pages)[: batch * per_row].reshape(batch, per_row)
        at = np.arange(length)
        positions = np.where(at < options["kv_lengths"][:, None], at, -1)
        eight_bits = jnp.dtype(dtype).itemsize == 1

        @jax.jit
        def write(pages, sides, places):
            pages = pages.write(*sides, *places)
            if eight_bits:
                sides = jax.tree.map(lambda x: quantize(x, dtype).dequantize(), sides)
            return pages, sides

        pages, sides = write(pages, (keys, values), (I32(table), I32(positions)))
        used = -(-options["kv_lengths"][:, None] // page_size)
        table = np.where(np.arange(per_row) < used, table, 10**6)  # no token reaches these
        return (jnp.asarray(q), pages, table), sides, weights, options

    def check_pages(self, name, dtype, tolerance):
        (q, pages, table), sides, weights, options = self.build(name, dtype)
        options = dict(options)
        lengths = options.pop("kv_lengths")
        weights = jax.tree.map(jnp.asarray, weights)
        got = jax.jit(lambda *x: self.attend_pages(*x, options))(
            q, pages, I32(np.clip(table, 0, pages.num_pages - 1)), lengths, *weights
        )
        want = oracle.attention(q, *sides, *weights, {**options, "kv_lengths": lengths})
        jax.tree.map(functools.partial(close, tolerance=tolerance), got, want)

    def test_pages_match_the_definition(self, paged_case):
        self.check_pages(paged_case, "float32", self.paged_tolerance)

    def test_eight_bit_pages(self, format):
        self.check_pages("one_token", format, self.paged_tolerance)

    def test_a_traced_length_beyond_its_table_reads_no_other_row(self):
        """Nobody can check a number that is traced; a row of a server is somebody's prompt."""
        q = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 2, 16)), jnp.float32)
        pages = Pages.create(
            num_pages=4, page_size=16, num_kv_heads=1, num_keys=1, num_values=1, key_size=16,
            value_size=16, dtype="float32",
        )  # fmt: skip
        other = dataclasses.replace(pages, data=pages.data.at[2:].set(9.0))
        run = jax.jit(lambda *x: self.attend_pages(*x, None, None, {})[0])
        rows = I32([[0, 1], [2, 3]]), I32([40, 32])
        np.testing.assert_array_equal(run(q, pages, *rows)[0], run(q, other, *rows)[0])
