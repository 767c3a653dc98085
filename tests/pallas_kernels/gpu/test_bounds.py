"""Tables of tiles against the definition of visibility, query by query and key by key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu import bounds
from pallas_kernels.masks import Mask
from tests.oracles import attention as oracle
from tests.pallas_kernels.cases import CASES, CORE

NAMES = (*CORE, "full_ragged", "window_decode", "ring_chunk", "segments_unsorted")


def build(name):
    """A case's mask, its visibility [B, T, S] and its shape."""
    (batch, length, keys, heads, kv_heads, *_), options = CASES[name]
    seen = np.array(
        [
            [
                [oracle.visible(b, t, s, length, keys, options) for s in range(keys)]
                for t in range(length)
            ]
            for b in range(batch)
        ]
    )
    rest = {k: v for k, v in options.items() if k not in ("scale", "softcap", "causal")}
    rest = {k: jnp.asarray(v) if hasattr(v, "shape") else v for k, v in rest.items()}
    mask = Mask(causal=options.get("causal", True), **rest)
    return mask, seen, (length, keys, heads // kv_heads)


def blocked(seen, groups, rows, size):
    """[B, I, J, rows, keys] of rows; None where a block has no such row or key."""
    seen = np.repeat(seen, groups, axis=1)
    batch, count, keys = seen.shape
    for i in range(-(-count // rows)):
        for j in range(-(-keys // size)):
            yield i, j, seen[:, i * rows : (i + 1) * rows, j * size : (j + 1) * size]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_dropped_is_unseen_and_what_is_clear_is_seen(name):
    mask, seen, (length, keys, groups) = build(name)
    rows, size = 6, 8

    @jax.jit
    def tables():
        some, clear = bounds.tiles(mask, length, keys, groups, rows, size)
        return some, clear, bounds.runs(some, clear)

    some, clear, runs = map(np.asarray, tables())
    runs = np.broadcast_to(runs, (len(seen), *runs.shape[1:]))
    some, clear = (np.broadcast_to(x, (len(seen), *x.shape[1:])) for x in (some, clear))
    for i, j, part in blocked(seen, groups, rows, size):
        any_, all_ = part.any((1, 2)), part.all((1, 2))
        assert not (any_ & ~some[:, i, j]).any()
        assert not (clear[:, i, j] & ~(all_ & (part.shape[2] == size))).any()
        low, high, clear_low, clear_high = runs[:, i].T
        assert (any_ <= ((low <= j) & (j < high))).all()
        assert (((clear_low <= j) & (j < clear_high)) <= clear[:, i, j]).all()
        assert ((low <= clear_low) & (clear_low <= clear_high) & (clear_high <= high)).all()


def test_causal_tables_are_exact():
    mask = Mask(causal=True)
    some, clear = bounds.tiles(mask, 64, 64, 2, 32, 16)  # a block has 16 queries
    np.testing.assert_array_equal(some[0], np.tri(4, dtype=bool))
    np.testing.assert_array_equal(clear[0], np.tri(4, k=-1, dtype=bool))
    assert bounds.runs(some, clear)[0].tolist() == [[0, i + 1, 0, i] for i in range(4)]


@pytest.mark.parametrize("name", ["one_token", "window_decode", "nothing"])
def test_spans_hold_every_visible_key(name):
    mask, seen, (length, keys, _) = build(name)
    span = np.broadcast_to(bounds.token_span(mask, length, keys), (len(seen), 2))
    index = np.arange(keys)
    inside = (span[:, :1] <= index) & (index < span[:, 1:])
    assert (seen.any(1) <= inside).all()
    if name == "window_decode":
        assert (inside == seen.any(1)).all()
