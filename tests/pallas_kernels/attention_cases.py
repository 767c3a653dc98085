"""The cases that every implementation of `attention` passes, as one abstract test class."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import pallas_kernels
from tests.pallas_kernels import oracle

I32 = functools.partial(np.asarray, dtype=np.int32)

# name: ((B, T, S, N, K, H, H', J, J'), options)
CASES = {
    "plain": ((2, 33, 33, 4, 4, 64, 64, 1, 1), {}),
    "full": ((2, 17, 29, 3, 1, 80, 80, 1, 1), {"causal": False}),
    "fused": ((2, 40, 40, 8, 1, 96, 64, 2, 2), {}),
    "one_token": ((3, 1, 70, 6, 2, 16, 16, 2, 2), {"kv_lengths": I32([70, 33, 0])}),
    "two_tokens": ((2, 2, 45, 3, 3, 16, 24, 1, 3), {"kv_lengths": I32([45, 1])}),
    "chunk": ((2, 11, 50, 4, 2, 16, 16, 2, 1), {"kv_lengths": I32([31, 11])}),
    "full_ragged": (
        (2, 7, 30, 4, 2, 16, 16, 2, 1),
        {"causal": False, "kv_lengths": I32([3, 30])},
    ),
    "more_queries": ((1, 37, 20, 2, 2, 16, 16, 1, 1), {}),
    "window_1": ((2, 21, 21, 2, 1, 16, 16, 1, 1), {"window": 1}),
    "window_block": ((1, 70, 70, 2, 1, 16, 16, 2, 2), {"window": 5}),
    "window_all": ((1, 21, 30, 2, 1, 16, 16, 1, 1), {"window": 99}),
    "window_decode": (
        (2, 1, 90, 2, 1, 16, 16, 1, 1),
        {"window": 6, "kv_lengths": I32([80, 9])},
    ),
    "softcap": ((2, 19, 19, 4, 2, 16, 16, 2, 2), {"softcap": 1.5, "scale": 0.7}),
    "softcap_ragged": (
        (2, 3, 19, 4, 2, 16, 16, 1, 1),
        {"softcap": 2.0, "kv_lengths": I32([2, 19])},
    ),
    "segments": (
        (2, 24, 24, 2, 1, 16, 16, 1, 1),
        {
            "q_segment_ids": I32([[0] * 7 + [1] + [2] * 13 + [-1] * 3, [-1] * 4 + [5] * 20]),
            "kv_segment_ids": I32([[0] * 7 + [1] + [2] * 13 + [-1] * 3, [-1] * 4 + [5] * 20]),
            "window": 9,
        },
    ),
    "segments_unsorted": (
        (1, 12, 30, 2, 1, 16, 16, 2, 2),
        {
            "q_segment_ids": I32([np.arange(12) % 3]),
            "kv_segment_ids": I32([np.arange(30) * 7 % 5 - 1]),
            "causal": False,
        },
    ),
    "ring": (
        (2, 1, 32, 4, 2, 16, 16, 2, 2),
        {
            "kv_positions": I32([np.roll(np.arange(20, 52), 9), [*range(5), *[-1] * 27]]),
            "q_positions": I32([[51], [4]]),
            "window": 16,
        },
    ),
    "ring_chunk": (
        (1, 13, 40, 4, 2, 16, 16, 1, 1),
        {
            "kv_positions": I32([np.roll(np.arange(60, 100), 17)]),
            "q_positions": I32([np.arange(87, 100)]),
        },
    ),
    "left_padded": (
        (2, 20, 20, 2, 2, 16, 16, 2, 2),
        {
            "kv_positions": I32([np.arange(20) - 6, np.arange(20)]),
            "q_positions": I32([np.arange(20) - 6, np.arange(20)]),
        },
    ),
    "nothing": ((1, 5, 9, 2, 1, 16, 16, 2, 2), {"kv_lengths": I32([0])}),
}


def draw(name: str, shape):
    """Normal inputs, and cotangents for the output and the lse."""
    batch, length, keys, heads, kv_heads, size, value_size, num_k, num_v = shape
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    normal = lambda *s: rng.normal(size=s).astype(np.float32)  # noqa: E731
    arguments = (
        normal(batch, length, heads, size),
        tuple(normal(batch, keys, kv_heads, size) for _ in range(num_k)),
        tuple(normal(batch, keys, kv_heads, value_size) for _ in range(num_v)),
        normal(num_k, kv_heads, size) if num_k > 1 else None,
        normal(num_v, kv_heads, value_size) if num_v > 1 else None,
    )
    return arguments, (normal(batch, length, heads, value_size), normal(batch, length, heads))


def poison(arguments, options):
    """The same arguments with NaN and infinity in the memory of every absent key."""
    q, keys, values, *weights = arguments
    keep = np.array(
        [[oracle.present(b, s, options) for s in range(keys[0].shape[1])] for b in range(len(q))]
    )[..., None, None]
    bad = lambda side, x: tuple(np.where(keep, y, np.float32(x)) for y in side)  # noqa: E731
    return (q, bad(keys, np.inf), bad(values, np.nan), *weights)


def close(got, want, tolerance=2e-5):
    """Equal up to `tolerance` of the largest wanted magnitude; infinities must coincide."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    size = np.abs(want[finite]).max(initial=1e-3)
    np.testing.assert_allclose(got[finite], want[finite], rtol=0, atol=tolerance * size)


def _as_jax(x):
    return jnp.asarray(x) if hasattr(x, "shape") else x


class AttentionCases:
    """Subclasses name the implementation."""

    implementation: str

    def attend(self, arguments, options):
        """(out, lse)."""
        arguments, options = jax.tree.map(_as_jax, (arguments, options))
        return pallas_kernels.attention(
            *arguments, return_residuals=True, implementation=self.implementation, **options
        )

    def run(self, arguments, options, cotangents):
        """(out, lse, gradients), jitted."""

        @jax.jit
        def both(arguments, cotangents):
            result, pull = jax.vjp(lambda *x: self.attend(x, options), *arguments)
            return *result, pull(cotangents)

        return both(arguments, cotangents)

    @pytest.mark.parametrize("name", CASES)
    def test_values_and_gradients_match_the_definition(self, name):
        shape, options = CASES[name]
        arguments, cotangents = draw(name, shape)
        want = oracle.attention(*arguments, options, *cotangents)
        got = self.run(poison(arguments, options), options, cotangents)
        jax.tree.map(close, got, want)
        blind = np.isneginf(want[1])
        assert (np.asarray(got[0])[blind] == 0).all() and (np.asarray(got[2][0])[blind] == 0).all()

    def test_weights_of_zero_and_one_are_plain_attention_and_cancelling_sources_cancel(self):
        (q, keys, values, _, _), _ = draw("switch", (2, 18, 18, 4, 2, 16, 16, 2, 2))
        one = np.stack([np.ones((2, 16)), np.zeros((2, 16))]).astype(np.float32)
        fused = self.attend((q, keys, values, one, one), {})
        plain = self.attend((q, keys[:1], values[:1], None, None), {})
        jax.tree.map(functools.partial(close, tolerance=1e-6), fused, plain)
        opposite = np.stack([np.ones((2, 16)), -np.ones((2, 16))]).astype(np.float32)
        twice = self.attend((q, keys[:1] * 2, values[:1] * 2, opposite, opposite), {})
        assert np.abs(np.asarray(twice[0])).max() < 1e-6
        close(twice[1][0, :, 0], np.log(np.arange(1, 19)), 1e-6)

    def test_two_halves_of_the_keys_combine_by_lse_also_in_the_gradient(self):
        arguments, (dout, _) = draw("halves", (2, 6, 26, 4, 2, 16, 16, 1, 1))
        positions = I32(np.broadcast_to(np.arange(26), (2, 26)))
        options = {"q_positions": I32([np.arange(6) + 3, np.arange(6) + 20])}

        def parts(q, keys, values, *weights):
            results = []
            for cut in (slice(0, 13), slice(13, 26)):
                sides = [tuple(x[:, cut] for x in side) for side in (keys, values)]
                options["kv_positions"] = positions[:, cut]
                results.append(self.attend((q, *sides, *weights), dict(options)))
            lse = jnp.stack([r[1] for r in results])
            share = jax.nn.softmax(lse, axis=0)[..., None]  # row 0 sees nothing of the second
            return sum(s * r[0] for s, r in zip(share, results, strict=True))

        got, pull = jax.vjp(jax.jit(parts), *arguments)
        options["kv_positions"] = positions
        zero = np.zeros(dout.shape[:3])
        want = oracle.attention(*arguments, options, dout, zero)
        close(got, want[0])
        jax.tree.map(close, pull(dout), want[2])

    def test_bfloat16_is_within_twice_the_error_of_the_plain_formula(self):
        shape = (2, 24, 24, 4, 2, 64, 64, 2, 2)
        arguments, cotangents = draw("bf16", shape)
        low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), arguments[:3])
        weights = arguments[3:]
        dout = jnp.asarray(cotangents[0], jnp.bfloat16)
        dlse = np.zeros_like(cotangents[1])
        exact = oracle.attention(*low, *weights, {}, dout, dlse)

        def naive(q, keys, values, a, b):
            mix = lambda side, w: sum(  # noqa: E731
                (x * y).astype(jnp.bfloat16) for x, y in zip(w, side, strict=True)
            )
            key, value = (jnp.repeat(mix(*x), 2, axis=2) for x in ((keys, a), (values, b)))
            score = jnp.einsum("btnh,bsnh->bnts", q, key) / 8
            score = jnp.where(np.tri(24, dtype=bool), score, -jnp.inf)
            return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(score, axis=-1), value)

        plain, pull = jax.vjp(naive, *low, *weights)
        got = self.run((*low, *weights), {}, (dout, dlse))
        wide = lambda x: np.asarray(x, np.float64)  # noqa: E731
        rounding = wide((low[0] + jnp.bfloat16(0.3)) - jnp.bfloat16(0.3)) - wide(low[0])
        pairs = zip(
            *map(jax.tree.leaves, ((got[0], got[2]), (plain, pull(dout)), exact[::2])),
            strict=True,
        )
        for ours, theirs, truth in pairs:
            size = max(1.0, np.abs(truth).max())
            allowed = 2 * np.abs(wide(theirs) - truth).max() + 2 * np.abs(rounding).max() * size
            assert np.abs(wide(ours) - truth).max() <= allowed
            assert np.linalg.norm(wide(ours) - truth) <= 0.02 * np.linalg.norm(truth)
        assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32

    def test_rematerialised_inside_a_scan_gives_the_same_gradients(self):
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

    @settings(
        max_examples=5,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # every example compiles: shrinking a failure takes minutes
        # Every subclass runs it on purpose; examples are not replayed from one to another.
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
    )
    @given(data=st.data())
    def test_any_shape(self, data):
        pick = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
        kv_heads, size = pick(1, 3), 4 * pick(1, 4)
        batch, keys = pick(1, 3), pick(1, 40)
        shape = (
            batch, pick(1, 40), keys, kv_heads * pick(1, 3), kv_heads, size, size,
            pick(1, 3), pick(1, 3),
        )  # fmt: skip
        options = {
            "causal": data.draw(st.booleans()),
            "window": data.draw(st.none() | st.integers(1, 50)),
        }
        if data.draw(st.booleans()):
            options["kv_lengths"] = I32([pick(0, keys) for _ in range(batch)])
        arguments, cotangents = draw(str(shape), shape)
        want = oracle.attention(*arguments, options, *cotangents)
        got = self.run(poison(arguments, options), options, cotangents)
        jax.tree.map(close, got, want)
