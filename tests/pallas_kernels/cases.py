"""Inputs of the shared tests: cases by name, normal numbers, poisoned memory, closeness."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.call import AttentionCall, PagedAttentionCall, RaggedAttentionCall
from pallas_kernels.masks import Mask
from pallas_kernels.sources import MixedSources
from tests.oracles import attention as oracle

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
    "heads_of_128": ((1, 35, 35, 6, 2, 128, 128, 2, 2), {"kv_lengths": I32([31])}),
    "no_window_for_some": (
        (2, 9, 40, 3, 1, 16, 16, 2, 2),
        {"window": 3, "q_positions": I32([np.arange(9) + 60, np.arange(9) * 5])},
    ),
}

# A few of each kind, for implementations that are slow to test.
CORE = (
    "plain", "fused", "one_token", "chunk", "window_block", "segments", "ring", "left_padded",
    "softcap", "nothing",
)  # fmt: skip

# name: shape as above, for the rule of twice the plain formula's error in 16 bits
ROUNDED = {
    "one_source": (1, 40, 40, 4, 4, 64, 64, 1, 1),
    "fused_64": (2, 24, 24, 4, 2, 64, 64, 2, 2),
    "fused_80": (1, 19, 33, 3, 1, 80, 80, 2, 2),
    "fused_96": (1, 17, 17, 8, 1, 96, 96, 3, 2),
    "fused_128": (1, 33, 33, 2, 1, 128, 128, 2, 2),
    "cancelling": (1, 33, 33, 2, 1, 128, 128, 2, 2),
    "few_queries": (2, 3, 40, 4, 2, 64, 64, 2, 2),
}


def needs(name: str) -> frozenset[str]:
    """What a case asks of an implementation, in the words of `AttentionCases.unsupported`."""
    shape, options = CASES[name]
    found = {"full"} if not options.get("causal", True) else set()
    found |= {"value_size"} if shape[5] != shape[6] else set()
    for word, option in {
        "window": "window",
        "softcap": "softcap",
        "segments": "q_segment_ids",
        "positions": "q_positions",
        "ring": "kv_positions",
        "lengths": "kv_lengths",
    }.items():
        found |= {word} if option in options else set()
    return frozenset(found)


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


def nearly_cancelling(arguments):
    """Two sources of correlation 0.95 with weights near 1 and -1: what rounding hurts most."""
    q, keys, values, *weights = arguments
    alike = lambda x, y: (x, 0.95 * x + 0.3 * y)  # noqa: E731
    signs = np.array([1, -1], np.float32)[:, None, None]
    return (q, alike(*keys), alike(*values), *(signs + 0.05 * w for w in weights))


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


def as_jax(tree):
    """NumPy arrays as JAX's."""
    return jax.tree.map(lambda x: jnp.asarray(x) if hasattr(x, "shape") else x, tree)


def call_of(arguments, options=None) -> AttentionCall:
    """What an implementation gets for these arguments and options of `pallas_kernels.attention`."""
    (q, keys, values, *weights), options = as_jax((tuple(arguments), dict(options or {})))
    scale, softcap = options.pop("scale", None), options.pop("softcap", None)
    return AttentionCall(
        q=q,
        sources=MixedSources(tuple(keys), tuple(values), *weights),
        mask=Mask(**{"causal": True, **options}),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
    )


def paged_call_of(
    q, pages, table, lengths, key_weights, value_weights, **options
) -> PagedAttentionCall:
    """Likewise of `pallas_kernels.paged_attention`."""
    options = {"window": None, "softcap": None, "scale": q.shape[-1] ** -0.5, **options}
    return PagedAttentionCall(
        q=q,
        pages=pages,
        page_table=table,
        kv_lengths=lengths,
        key_weights=key_weights,
        value_weights=value_weights,
        **options,
    )


def ragged_call_of(q, keys, values, rows, key_weights, value_weights, **options):
    """Likewise of `pallas_kernels.ragged_attention`."""
    options = {"window": None, "softcap": None, "scale": q.shape[-1] ** -0.5, **options}
    sources = MixedSources(keys, values, key_weights, value_weights)
    return RaggedAttentionCall(q=q, sources=sources, rows=rows, residuals=True, **options)
