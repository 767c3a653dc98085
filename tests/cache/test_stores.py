"""Stores against their definition: what each query attends to, however its tokens arrived."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.cache.calls import Call, Rows
from fusedkv_jax.cache.plan import split_plan
from fusedkv_jax.cache.storage import take_tokens
from fusedkv_jax.cache.stores import LinearStore
from pallas_kernels import attention
from pallas_kernels.combining import combine

B, T, K, N, H = 2, 236, 2, 4, 16
LENGTHS = np.array([236, 203], np.int32)
RECENT, GROUP, WINDOW = 128, 32, 7


def config(layout="mha", **changes):
    return fkv.ModelConfig(
        vocab_size=10, num_layers=1, d_model=16, num_heads=N, num_kv_heads=K, head_dim=H,
        d_ff=16, layout=layout, **changes,
    )  # fmt: skip


def rounded(x, dtype):
    """x [S, K, H] as stored in 8 bits: one scale for each token and head."""
    top = 127 if dtype == "int8" else float(jnp.finfo(dtype).max)
    scale = np.abs(x).max(-1, keepdims=True).astype(np.float32) / top
    codes = np.round(x / scale) if dtype == "int8" else (x / scale).astype(dtype)
    return codes.astype(np.float32) * scale


def four_bits(x, axis):
    """x in groups along one axis, 16 levels from the least to the largest."""
    x = np.moveaxis(x, axis, -1)
    groups = x.reshape(*x.shape[:-1], -1, min(GROUP, x.shape[-1]))
    zero = groups.min(-1, keepdims=True).astype(np.float16).astype(np.float32)
    scale = ((groups.max(-1, keepdims=True) - zero) / 15).astype(np.float16).astype(np.float32)
    codes = np.clip(np.round((groups - zero) / scale), 0, 15)
    return np.moveaxis((codes * scale + zero).reshape(x.shape), -1, axis)


def stored(keys, values, t, dtype):
    """What the query at position t reads of one row's keys and values [S, K, H]."""
    if dtype == "float32":
        return keys[: t + 1], values[: t + 1]
    if dtype != "int4":
        return rounded(keys[: t + 1], dtype), rounded(values[: t + 1], dtype)
    old = GROUP * max(0, (t - RECENT) // GROUP)
    keys, values = keys[: t + 1].copy(), values[: t + 1].copy()
    if old:
        keys[:old], values[:old] = four_bits(keys[:old], 0), four_bits(values[:old], 2)
    return keys, values


def definition(q, keys, values, dtype, window):
    out = np.zeros_like(q)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            k, v = stored(keys[row], values[row], t, dtype)
            k, v = k[-window:].repeat(N // K, 1), v[-window:].repeat(N // K, 1)
            scores = np.einsum("nh,snh->ns", q[row, t], k) / np.sqrt(H)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[row, t] = np.einsum("ns,snh->nh", weights / weights.sum(-1, keepdims=True), v)
    return out


@functools.partial(jax.jit, static_argnums=0)
def step(window, store, first, count, q, keys, values):
    """One layer's call: its new tokens go in, its queries read."""
    call = Call(first, count, q.shape[1])
    new = {"key": keys, "value": values}
    for kind, stream in new.items():
        store = store.write(kind, 0, stream, call)
    views = [
        (store.view(kind, 0, new[kind] if store.writes_at_end(call) else None, call),)
        for kind in new
    ]
    pieces = store.pieces(*views, q, Rows(call.positions, window, False), call)
    outs = [attention(q, p.keys, p.values, **p.mask, return_residuals=True) for p in pieces]
    bank = {kind: x[None] for kind, x in new.items()} if store.writes_at_end(call) else {}
    return store.finish(bank, call), combine(outs)[0]


def in_chunks(sizes, store, window, *streams):
    first, outs, start = jnp.zeros(B, jnp.int32), [], 0
    for size in sizes:
        count = jnp.asarray(np.clip(LENGTHS - start, 0, size), jnp.int32)
        part = [jnp.asarray(x[:, start : start + size]) for x in streams]
        store, out = step(window, store, first, count, *part)
        outs.append(out)
        first, start = first + count, start + size
    assert start == T
    return store, np.concatenate(outs, axis=1)


@pytest.mark.parametrize("layout", ["mha", f"0s{WINDOW}"], ids=["linear", "ring"])
@pytest.mark.parametrize(
    "dtype",
    ["int8", "float8_e4m3fn", pytest.param("float8_e5m2", marks=pytest.mark.slow), "int4"],
)
def test_every_query_reads_what_is_stored(dtype, layout):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(B, T, N, H)).astype(np.float32)
    keys, values = rng.normal(size=(2, B, T, K, H)).astype(np.float32)
    window = None if layout == "mha" else WINDOW
    empty = fkv.KVCache.create(config(layout), batch_size=B, max_length=T, dtype=dtype).stores[0]
    assert type(empty).__name__ == (
        "RingStore" if window else "KiviStore" if dtype == "int4" else "LinearStore"
    )
    exact = bool(window) and dtype == "int4"  # rings stay exact
    reads = definition(q, keys, values, "float32" if exact else dtype, window or T)
    valid = np.arange(T) < LENGTHS[:, None]
    stores = []
    for sizes in ([T], [58] * 3 + [1] * 62):
        store, out = in_chunks(sizes, empty, window, q, keys, values)
        error = np.abs(np.where(valid[..., None, None], out - reads, 0))
        assert error.max() < 2e-5, (sizes[:2], error.max())
        stores.append(store)
    for a, b in zip(*map(jax.tree.leaves, stores), strict=True):  # the same bits
        np.testing.assert_array_equal(a, b)


def test_dropped_tokens_leave_their_places_to_later_ones():
    """Each head keeps tokens of its own; new ones follow, and all that is kept is seen."""
    rng = np.random.default_rng(1)
    keys, values = rng.normal(size=(2, 1, B, 9, K, H)).astype(np.float32)
    kept = np.stack([rng.permutation(9)[:4] for _ in range(B * K)]).reshape(B, K, 4)
    room = [(0, 0)] * 2 + [(0, 3)] + [(0, 0)] * 2
    storages = [
        jnp.pad(take_tokens(jnp.asarray(x), jnp.asarray(kept)), room) for x in (keys, values)
    ]
    store = LinearStore(*storages, dropped=jnp.full(B, 5, jnp.int32))
    q = rng.normal(size=(B, 2, N, H)).astype(np.float32)
    new = rng.normal(size=(2, B, 2, K, H)).astype(np.float32)
    call = (jnp.full(B, 9, jnp.int32), jnp.full(B, 2, jnp.int32))
    store, out = step(None, store, *call, jnp.asarray(q), *map(jnp.asarray, new))
    for row in range(B):
        for n in range(N):
            k, v = (
                np.concatenate([x[0, row, kept[row, n // 2], n // 2], y[row, :, n // 2]])
                for x, y in zip((keys, values), new, strict=True)
            )
            for t in range(2):
                weights = np.exp(k[: 5 + t] @ q[row, t, n] / np.sqrt(H))
                expected = weights @ v[: 5 + t] / weights.sum()
                np.testing.assert_allclose(out[row, t, n], expected, atol=1e-5)


def test_streams_are_split_as_far_as_they_are_read_apart():
    layout = fkv.layouts.get("fusedkv", 8)
    plan = split_plan(layout)
    assert sorted((g.keys, g.values) for g in plan.groups) == [
        ((0, 3), (0, 3)), ((1,), (1,)), ((2,), (2,))
    ]  # fmt: skip
    assert len(split_plan(fkv.layouts.get("mha", 5)).groups) == 5


@pytest.mark.parametrize(
    "changes, dtype, message",
    [
        ({}, "int9", "dtype='int9' is no dtype; use .* did you mean int8?"),
        ({}, "int32", "dtype='int32' is no storage type of caches; use bfloat16"),
        ({"head_dim": 12}, "int4", "dtype='int4' needs values whose channels, here 12"),
        ({"layout": "0s4_1"}, "int4", None),
        ({"layout": "0_0s4"}, "int4", "does not serve layer 1, whose window reads a stream"),
    ],
)
def test_storage_types_that_cannot_be_had(changes, dtype, message):
    def create():
        fields = {"head_dim": H, "layout": "mha"} | changes
        model = fkv.ModelConfig(
            vocab_size=10, num_layers=2, d_model=16, num_heads=N, num_kv_heads=K, d_ff=16, **fields
        )
        fkv.KVCache.create(model, batch_size=1, max_length=200, dtype=dtype)

    if message is None:
        return create()
    with pytest.raises(ValueError, match=message):
        create()
