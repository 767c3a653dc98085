"""The tests that every implementation of `attention` passes, as one abstract class."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import pallas_kernels
from tests.oracles import attention as oracle
from tests.pallas_kernels.cases import (
    CASES,
    I32,
    ROUNDED,
    close,
    draw,
    nearly_cancelling,
    poison,
)
from tests.pallas_kernels.implementation import Implementation


def _wide(x):
    return np.asarray(x, np.float64)


class AttentionCases(Implementation):
    """See `Implementation` for what a subclass sets."""

    def run(self, arguments, options, cotangents):
        """(out, lse, gradients), jitted; twice, for the same bits."""

        @jax.jit
        def both(arguments, cotangents):
            if "gradients" in self.unsupported:
                return *self.attend(arguments, options), None
            result, pull = jax.vjp(lambda *x: self.attend(x, options), *arguments)
            return *result, pull(cotangents)

        found = jax.block_until_ready(both(arguments, cotangents))
        jax.tree.map(np.testing.assert_array_equal, both(arguments, cotangents), found)
        return found

    def compare(self, got, want):
        """Holds a result of `run` against the definition's."""
        out, lse, gradients = got
        close(out, want[0], self.tolerance)
        if "residuals" not in self.unsupported:
            close(lse, want[1], self.tolerance)
        if gradients is not None:
            jax.tree.map(functools.partial(close, tolerance=self.tolerance), gradients, want[2])
        blind = np.isneginf(want[1])
        assert (np.asarray(out)[blind] == 0).all()
        assert gradients is None or (np.asarray(gradients[0])[blind] == 0).all()

    def test_values_and_gradients_match_the_definition(self, case):
        shape, options = CASES[case]
        arguments, cotangents = self.draw(case, shape)
        want = oracle.attention(*arguments, options, *cotangents)
        self.compare(self.run(poison(arguments, options), options, cotangents), want)

    def test_weights_of_zero_and_one_are_plain_attention_and_cancelling_sources_cancel(self):
        (q, keys, values, _, _), _ = draw("switch", (2, 18, 18, 4, 2, 16, 16, 2, 2))
        one = np.stack([np.ones((2, 16)), np.zeros((2, 16))]).astype(np.float32)
        attend = jax.jit(lambda *x: self.attend(x, {}))
        fused = attend(q, keys, values, one, one)
        plain = attend(q, keys[:1], values[:1], None, None)
        jax.tree.map(functools.partial(close, tolerance=1e-6), fused, plain)
        opposite = np.stack([np.ones((2, 16)), -np.ones((2, 16))]).astype(np.float32)
        twice = attend(q, keys[:1] * 2, values[:1] * 2, opposite, opposite)
        assert np.abs(np.asarray(twice[0])).max() < 1e-6
        if "residuals" not in self.unsupported:
            close(twice[1][0, :, 0], np.log(np.arange(1, 19)), 1e-6)

    def test_two_parts_of_the_keys_combine_also_in_the_gradient(self):
        self.skip_without("residuals", "positions", "ring")
        arguments, (dout, dlse) = draw("halves", (2, 6, 26, 4, 2, 16, 16, 1, 1))
        positions = I32(np.broadcast_to(np.arange(26), (2, 26)))
        options = {"q_positions": I32([np.arange(6) + 3, np.arange(6) + 20])}

        def parts(q, keys, values, *weights):
            results = []
            for cut in (slice(0, 13), slice(13, 26)):  # row 0 sees nothing of the second
                sides = [tuple(x[:, cut] for x in side) for side in (keys, values)]
                places = {**options, "kv_positions": positions[:, cut]}
                results.append(self.attend((q, *sides, *weights), places))
            return pallas_kernels.combine(results)

        @jax.jit
        def both(arguments):
            if "gradients" in self.unsupported:
                return *parts(*arguments), None
            result, pull = jax.vjp(parts, *arguments)
            return *result, pull((dout, dlse))

        options = {**options, "kv_positions": positions}
        want = oracle.attention(*arguments, options, dout, dlse)
        options.pop("kv_positions")
        self.compare(both(arguments), want)

    def test_rounding_is_within_twice_the_error_of_the_plain_formula(self, rounded):
        shape, narrow = ROUNDED[rounded], jnp.dtype(self.narrow)
        arguments, (dout, dlse) = draw(rounded, shape)
        arguments = nearly_cancelling(arguments) if rounded == "cancelling" else arguments
        low = jax.tree.map(lambda x: jnp.asarray(x, narrow), arguments[:3])
        arguments, dout, dlse = (*low, *arguments[3:]), jnp.asarray(dout, narrow), 0 * dlse
        exact = oracle.attention(*arguments, {}, dout, dlse)
        seen = oracle.visibility((shape[0], shape[1], shape[2]), {})

        @jax.jit
        def plain(*arguments):
            out, pull = jax.vjp(functools.partial(oracle.naive, seen), *arguments)
            return out, pull(dout)

        got = self.run(arguments, {}, (dout, dlse))
        sides = [(got[0], got[2]), plain(*arguments), exact[::2]]
        if got[2] is None:
            sides = [side[0] for side in sides]
        ours, theirs, truths = map(jax.tree.leaves, sides)
        step = np.abs(_wide((low[0] + narrow.type(0.3)) - narrow.type(0.3)) - _wide(low[0])).max()
        for found, other, truth in zip(ours, theirs, truths, strict=True):
            floor = 2 * step * max(1.0, np.abs(truth).max())
            allowed = 2 * np.abs(_wide(other) - truth).max() + floor
            assert np.abs(_wide(found) - truth).max() <= allowed
            allowed = 2 * np.linalg.norm(_wide(other) - truth) + 0.002 * np.linalg.norm(truth)
            assert np.linalg.norm(_wide(found) - truth) <= allowed
        assert got[0].dtype == narrow and got[1].dtype == jnp.float32

    def test_wide_sources_sum_their_gradients_in_float32(self):
        """Eight layers read the same sources: 16-bit gradients would be rounded by every one."""
        self.skip_without("gradients", "wide_sources")
        (q, *rest), (dout, _) = draw("wide", (1, 12, 12, 4, 2, 16, 16, 2, 2))
        narrow = jnp.dtype(self.narrow)
        sources = jax.tree.map(lambda x: jnp.asarray(x, narrow).astype(jnp.float32), rest[:2])
        queries = jnp.asarray(np.random.default_rng(0).normal(size=(8, *q.shape)), narrow)

        def layer(sources, q):
            out = self.attend((q, *sources, *rest[2:]), {})[0]
            return (out.astype(jnp.float32) * dout).sum()

        def layers(sources):
            return jax.lax.scan(lambda x, q: (x + layer(sources, q), None), 0.0, queries)[0]

        together, one = jax.jit(jax.grad(layers)), jax.jit(jax.grad(layer))
        single = [jax.tree.leaves(one(sources, q)) for q in queries]
        for found, *parts in zip(jax.tree.leaves(together(sources)), *single, strict=True):
            close(found, sum(map(_wide, parts)), 2e-6)
            assert found.dtype == jnp.float32
            assert (np.asarray(parts[0].astype(narrow)) != np.asarray(parts[0])).mean() > 0.5

    def test_rematerialised_inside_a_scan_gives_the_same_gradients(self):
        self.skip_without("gradients")
        arguments, (dout, _) = draw("scan", (1, 16, 16, 2, 1, 16, 16, 2, 2))

        def layers(wrap):
            def layer(x, _):
                return x + self.attend((x, *arguments[1:]), {})[0], None

            return lambda q: (jax.lax.scan(wrap(layer), q, None, length=3)[0] * dout).sum()

        plain = jax.jit(jax.grad(layers(lambda f: f)))(arguments[0])
        again = jax.jit(jax.grad(layers(jax.checkpoint)))(arguments[0])
        close(again, plain, 1e-6)
        step = 1e-2 * np.asarray(plain) / np.linalg.norm(plain)
        loss = jax.jit(layers(lambda f: f))
        slope = (loss(arguments[0] + step) - loss(arguments[0] - step)) / 2e-2
        np.testing.assert_allclose(slope, np.linalg.norm(plain), rtol=1e-2)

    def test_all_at_once_is_chunk_by_chunk_is_token_by_token(self):
        self.skip_without("lengths")
        arguments, _ = draw("chunks", (2, 12, 16, 4, 2, 16, 16, 2, 2))
        q, *rest = arguments

        @jax.jit
        def chunk(q, lengths):
            return self.attend((q, *rest), {"kv_lengths": lengths})[0]

        def steps(size):
            parts = [chunk(q[:, i : i + size], I32([i + size] * 2)) for i in range(0, 12, size)]
            return jnp.concatenate(parts, axis=1)

        want = oracle.attention(*arguments, {"kv_lengths": I32([12, 12])})[0]
        for size in (12, 4, 1):
            close(steps(size), want, self.tolerance)

    def test_any_shape(self):
        """Random shapes and masks; those that are not served are left out."""

        @settings(
            max_examples=self.examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],  # every example compiles: shrinking would take minutes
            suppress_health_check=list(HealthCheck),
        )
        @given(data=st.data())
        def holds(data):
            shape, options = self._draw_call(data)
            arguments, cotangents = self.draw(str(shape), shape)
            want = oracle.attention(*arguments, options, *cotangents)
            self.compare(self.run(poison(arguments, options), options, cotangents), want)

        holds()

    def _draw_call(self, data):
        pick = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
        flip = lambda word: word not in self.unsupported and data.draw(st.booleans())  # noqa: E731
        heads, size, batch, keys = pick(1, 3), 4 * pick(1, 4), pick(1, 3), pick(1, 40)
        queries = pick(1, 40)
        value_size = 4 * pick(1, 4) if flip("value_size") else size
        shape = (
            batch, queries, keys, heads * pick(1, 3), heads, size, value_size, pick(1, 3),
            pick(1, 3),
        )  # fmt: skip
        options = {"causal": not flip("full")}
        if flip("window"):
            options["window"] = pick(1, 50)
        if flip("lengths"):
            options["kv_lengths"] = I32([pick(0, keys) for _ in range(batch)])
        if flip("segments"):
            ids = lambda n: I32([sorted(pick(-1, 2) for _ in range(n)) for _ in range(batch)])  # noqa: E731
            options |= {"q_segment_ids": ids(queries), "kv_segment_ids": ids(keys)}
        return shape, options
