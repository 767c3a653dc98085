"""What a cache cannot hold is refused, or where values are not known, gives NaN for that row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusedkv_jax as fkv
from fusedkv_jax.compression import PyramidInfer, SnapKV
from tests.model import small

WIDTH, ROOM = 4, 6
SPECS = {"full": ("fusedkv", 4), "windows": ("window_hybrid:window=2,full_every=2", 8)}


@pytest.fixture(scope="module", params=SPECS)
def model(request):
    spec, layers = SPECS[request.param]
    return small.decoder(small.config(spec, num_layers=layers))


def empty(model, **changes):
    settings = {"batch_size": 2, "max_length": ROOM} | changes
    return fkv.KVCache.create(model.config, **settings)


def filled(model, lengths=(4, 2)):
    return fkv.prefill(model, small.tokens(2, WIDTH), jnp.asarray(lengths), empty(model))[1]


def test_a_full_row_turns_to_nan_and_the_others_do_not(model):
    cache, wide = filled(model), fkv.KVCache.create(model.config, batch_size=2, max_length=32)
    wide = fkv.prefill(model, small.tokens(2, WIDTH), jnp.asarray([4, 2]), wide)[1]
    token = jnp.asarray([1, 2])
    for step in range(1, 4):
        logits, cache = fkv.decode_step(model, token, cache)
        expected, wide = fkv.decode_step(model, token, wide)
        full = step > ROOM - 4
        assert cache.overflowed.tolist() == [full, False]
        assert np.isnan(logits[0]).all() if full else np.isfinite(logits[0]).all()
        np.testing.assert_allclose(logits[full:], expected[full:], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([[1] * WIDTH] * 2, [3, 2], "row 0 holds 4 tokens and is given 3 more.*has room for 6"),
        ([[1] * WIDTH] * 2, [0, WIDTH + 1], "lengths holds 5; use 0 to 4"),
        ([[1] * WIDTH] * 2, [0, -1], "lengths holds -1; use 0 to 4"),
        ([[1, 1, 1, 1], [1, small.VOCAB, 0, 0]], [1, 2], "id 61; use ids from 0 to .* = 60"),
        ([[1, 1, 1, 1], [-1, 0, 0, 0]], [1, 2], "id -1; use ids from 0"),
        ([[1] * WIDTH] * 3, [1, 1, 1], "batch_size=2 but tokens has 3 rows"),
    ],
)
def test_prefill_refuses_and_leaves_the_cache(model, tokens, lengths, message):
    cache = filled(model)
    tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
    if len(tokens) == 3:
        cache = empty(model)
    with pytest.raises(ValueError, match=message):
        fkv.prefill(model, tokens, lengths, cache)
    logits, _ = fkv.decode_step(model, jnp.asarray([1, 2]), cache)
    assert np.isfinite(logits).all()


def test_padding_may_hold_any_id(model):
    tokens = small.tokens(2, WIDTH).at[1, 2:].set(-1)
    logits, _ = fkv.prefill(model, tokens, jnp.asarray([4, 2]), empty(model))
    wanted, _ = fkv.prefill(model, tokens.at[1, 2:].set(0), jnp.asarray([4, 2]), empty(model))
    np.testing.assert_array_equal(logits, wanted)


def test_inside_a_program_wrong_rows_are_nan_for_good(model):
    graph, params = nnx.split(model)

    @jax.jit
    def run(params, tokens, lengths, cache):
        model = nnx.merge(graph, params)
        first, cache = fkv.prefill(model, tokens, lengths, cache)
        later, cache = fkv.decode_step(model, jnp.ones(4, jnp.int32), cache)
        return first, later, cache.overflowed

    tokens = small.tokens(4, WIDTH).at[1, 0].set(small.VOCAB)
    cache = empty(model, batch_size=4)
    found = run(params, tokens, jnp.asarray([4, 2, WIDTH + 1, -1]), cache)
    for logits in found[:2]:
        assert np.isnan(logits).all(axis=1).tolist() == [False, True, True, True]
    assert found[2].tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    "compressor", [SnapKV(budget=8, window=4), PyramidInfer(budget=0.3)], ids=lambda c: c.title
)
def test_a_compressor_does_not_bring_back_a_row_that_is_lost_inside_a_program(compressor):
    model = small.decoder(small.config("mha", num_layers=4, max_length=256))
    graph, params = nnx.split(model)

    @jax.jit
    def run(params, tokens, lengths):
        model = nnx.merge(graph, params)
        cache = fkv.KVCache.create(model.config, batch_size=2, max_length=144)
        first, cache = fkv.prefill(model, tokens, lengths, cache, compression=compressor)
        later, cache = fkv.decode_step(model, jnp.ones(2, jnp.int32), cache)
        return first, later, cache.overflowed

    # A negative id reads a row of the table, so that nothing but the check tells.
    found = run(params, small.tokens(2, 140).at[1, 0].set(-1), jnp.asarray([140, 140]))
    for logits in found[:2]:
        assert np.isnan(logits).all(axis=1).tolist() == [False, True]
    assert found[2].tolist() == [False, True]


@pytest.mark.usefixtures("without_type_checks")
def test_a_model_refuses_ids_outside_its_vocabulary(model):
    with pytest.raises(ValueError, match="id 61; use ids from 0 to vocab_size - 1 = 60"):
        model(np.asarray([[1, 61]]))


def test_a_donated_cache_is_named(model):
    cache = filled(model)
    token = jnp.asarray([1, 2])
    fkv.decode_step(model, token, cache)
    for again in (
        lambda: fkv.decode_step(model, token, cache),
        lambda: fkv.prefill(model, small.tokens(2, WIDTH), jnp.asarray([1, 1]), cache),
    ):
        with pytest.raises(ValueError, match="cache was donated to an earlier call.*returned"):
            again()


def test_a_cache_of_another_model_is_named():
    model = small.decoder(small.config("fusedkv", num_layers=4))
    token = jnp.asarray([1, 2])
    for changes, message in (
        ({"layout": "mha"}, r"cache holds keys of layers \[0, 1, 2, 3\].*layers \[0, 1\] and"),
        ({"num_kv_heads": 4}, r"\(heads, channels\) \(4, 8\), but the model's are \(2, 8\)"),
    ):
        other = model.config.replace(**changes)
        cache = fkv.KVCache.create(other, batch_size=2, max_length=ROOM)
        with pytest.raises(ValueError, match=f"{message}.*create it with KVCache.create"):
            fkv.decode_step(model, token, cache)
