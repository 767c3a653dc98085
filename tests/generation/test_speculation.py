"""Self-speculative decoding: the same greedy outputs, the same distributions, and less work."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusedkv_jax as fkv
from fusedkv_jax.compression.registry import names, parse
from fusedkv_jax.generation import loop
from fusedkv_jax.generation.sampling import SamplerInputs
from fusedkv_jax.generation.speculation import SelfSpeculation, accept_or_replace
from fusedkv_jax.model import early_exit, fold_fusion
from tests.model import small

GREEDY = fkv.SamplingParams(temperature=0.0, max_tokens=12)


def _agreeing(spec, geometry="gqa", **changes):
    """A model whose upper layers change little, so that drafts are right now and then."""
    model = small.decoder(small.config(spec, geometry, **changes))
    for run in model.runs:
        for block in run:
            for parameter in (block.attention.o_proj, block.mlp.down):
                parameter.set_value(0.3 * parameter[...])
    return model


def _prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, small.VOCAB, rng.integers(1, 20)).tolist() for _ in range(count)]


def _state(model, rows, total=32, params=None, cache_dtype=None):
    """Rows after prefill and their first token, as `generate` hands them to the loop."""
    prompts = _prompts(rows, seed=5)
    tokens, lengths = np.zeros((rows, total), np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    cache = fkv.KVCache.create(model.config, batch_size=rows, max_length=total, dtype=cache_dtype)
    logits, cache = fkv.prefill(model, jnp.asarray(tokens[:, :24]), jnp.asarray(lengths), cache)
    limits = jnp.minimum(jnp.asarray(lengths) + 12, total)
    stops = jnp.full((rows, 4), -1, jnp.int32)
    inputs = SamplerInputs.create([params or GREEDY] * rows)
    bounds = loop.Bounds(jnp.asarray(lengths), limits, stops)
    state = loop.begin(logits, jnp.asarray(tokens), bounds, cache, inputs)
    return state, inputs


def _cases():
    """Every layout; exits in the middle of scanned bodies, below and above what caches."""
    exits = {
        "mha": 3,
        "cla": 3,
        "mlkv": 4,
        "svformer": 2,
        "svformer_half": 2,
        "resformer": 5,
        "window_hybrid": 3,
    }
    exits |= {
        "yoco_pp": 2,
        "lckv": 1,
        "lckv_middle": 1,
        "lckv_windowed": None,
        "yoco_windowed": 2,
        "hybrid_window_only": 3,
    }
    skipped = {"lckv_windowed", "serves_others"}
    for name, spec in {**small.SPECS, **small.EXTRA_SPECS}.items():
        if name not in skipped:
            yield pytest.param(spec, "gqa", exits.get(name), id=name, marks=small.marks(name))
    yield pytest.param("fusedkv", "mla", None, id="fusedkv-mla", marks=[pytest.mark.slow])
    for exit_layer in (1, 2, 3, 5, 6, 7):
        yield pytest.param(
            "fusedkv", "gqa", exit_layer, id=f"fusedkv-{exit_layer}", marks=[pytest.mark.slow]
        )


@pytest.mark.parametrize("spec, geometry, exit_layer", list(_cases()))
def test_greedy_output_is_that_of_plain_decoding(spec, geometry, exit_layer):
    model = fold_fusion(_agreeing(spec, geometry))
    speculation = SelfSpeculation(exit_layer=exit_layer, draft_tokens=3, adaptive=False)
    speculation.check(model.config)
    rows = 32
    state, inputs = _state(model, rows)
    expected = loop.decode(*nnx.split(model), jax.tree.map(jnp.copy, state), inputs, 99)
    found = speculation.decode(*nnx.split(model), state, inputs, 99)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_array_equal(found.cache.lengths, np.asarray(found.lengths) - 1)
    np.testing.assert_array_equal(found.counts, expected.counts)
    drafted, accepted, rounds = (int(x.sum()) for x in found.extra)
    produced = int(found.lengths.sum() - found.prompts.sum()) - rows
    assert produced == accepted + rounds and 0 < accepted < drafted
    # What the cache holds of the tokens seen is what plain decoding has put there.
    for store, other in zip(found.cache.stores, expected.cache.stores, strict=True):
        for x, y in zip(jax.tree.leaves(store), jax.tree.leaves(other), strict=True):
            seen = np.arange(x.shape[2]) < np.asarray(found.cache.lengths)[:, None]
            seen = seen[None, :, :, None, None]
            np.testing.assert_allclose(np.where(seen, x, 0), np.where(seen, y, 0), atol=1e-4)


@pytest.mark.parametrize("adaptive", [False, True])
def test_generate_with_speculation(adaptive):
    """Through the front door: ragged batches, stop tokens, penalties, many visits by the host."""
    model, prompts = _agreeing("fusedkv"), _prompts(12)
    plain = fkv.generate(model, prompts, GREEDY)
    stop = plain[0].token_ids[5]
    params = [
        dataclasses.replace(
            GREEDY,
            stop_token_ids=(stop,),
            repetition_penalty=1.0 + 0.2 * (i % 3),
            min_tokens=i % 4,
            max_tokens=1 + i,
        )
        for i in range(len(prompts))
    ]
    expected = fkv.generate(model, prompts, params)
    found = fkv.generate(
        model, prompts, params, speculation=SelfSpeculation(draft_tokens=3, adaptive=adaptive)
    )
    assert found == expected
    assert any(c.finish_reason == "stop" for c in found)


def test_no_draft_is_plain_decoding_and_adaptive_drafts_waste_less():
    model = fold_fusion(_agreeing("fusedkv"))
    split = nnx.split(model)
    outputs, rates = [], []
    for speculation in (
        SelfSpeculation(draft_tokens=0),
        SelfSpeculation(draft_tokens=3),
        SelfSpeculation(draft_tokens=3, adaptive=True),
    ):
        state, inputs = _state(model, 32)
        state = speculation.decode(*split, state, inputs, 99)
        outputs.append(np.asarray(state.tokens))
        if state.extra is not None:
            rates.append(int(state.extra.accepted.sum()) / int(state.extra.drafted.sum()))
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])
    assert len(rates) == 2 and rates[1] > rates[0]


def test_accepted_or_replaced_tokens_have_the_models_distribution():
    """Chi-square over many rows, for drafts that agree much, a little, and not at all."""
    rows, tokens = 1 << 18, 6
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(tokens)).astype(np.float32)
    inputs = SamplerInputs.create([fkv.SamplingParams(seed=0)])
    inputs = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), inputs)
    inputs = dataclasses.replace(inputs, seed=jnp.arange(rows, dtype=jnp.uint32))
    disjoint = np.where(np.arange(tokens) == p.argmin(), 1, 0).astype(np.float32)
    run = jax.jit(accept_or_replace)
    for q in (p, rng.dirichlet(np.ones(tokens)).astype(np.float32), disjoint):
        guess = jax.random.categorical(jax.random.key(9), jnp.log(q), shape=(rows,))
        token, right = run(
            jnp.broadcast_to(p, (rows, tokens)),
            jnp.broadcast_to(q, (rows, tokens)),
            guess.astype(jnp.int32),
            jnp.ones(rows, bool),
            inputs,
            jnp.full(rows, 7, jnp.int32),
        )
        counts = np.bincount(np.asarray(token), minlength=tokens)
        statistic = ((counts - rows * p) ** 2 / (rows * p)).sum()
        assert statistic < 25.7  # the 0.9999 quantile for 5 degrees of freedom
        overlap = np.minimum(p, q).sum()
        np.testing.assert_allclose(np.asarray(right).mean(), overlap, atol=3e-3)


def test_sampled_pairs_of_tokens_have_the_models_distribution():
    """Joint distribution of the next two tokens, against the full forward, top-k included."""
    model = fold_fusion(_agreeing("fusedkv", num_layers=4, vocab_size=7))
    rows, top_k = 8192, 4
    prompt = jnp.asarray([1, 5, 2], jnp.int32)
    params = fkv.SamplingParams(temperature=0.8, top_k=top_k, seed=0, max_tokens=3)
    inputs = SamplerInputs.create([params])
    inputs = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), inputs)
    inputs = dataclasses.replace(inputs, seed=jnp.arange(rows, dtype=jnp.uint32))
    cache = fkv.KVCache.create(model.config, batch_size=rows, max_length=8)
    lengths = jnp.full(rows, 2, jnp.int32)
    _, cache = fkv.prefill(model, jnp.broadcast_to(prompt[:2], (rows, 2)), lengths, cache)
    buffer = jnp.zeros((rows, 8), jnp.int32).at[:, :3].set(prompt)
    stops, limits = jnp.full((rows, 4), -1, jnp.int32), jnp.full(rows, 6, jnp.int32)
    state = loop.DecodeState.create(buffer, loop.Bounds(lengths + 1, limits, stops), cache, 7)
    state = jax.tree.map(jnp.copy, state)  # donated: no array may be in it twice
    state = SelfSpeculation(draft_tokens=2).decode(*nnx.split(model), state, inputs, 99)
    found = np.asarray(state.tokens)[:, 3:5]
    pairs = jnp.asarray([[1, 5, 2, a] for a in range(7)], jnp.int32)
    logits = np.asarray(model(pairs), np.float64) / 0.8
    kth = np.sort(logits, axis=-1)[..., -top_k, None]
    weights = np.where(logits >= kth, np.exp(logits), 0)
    probabilities = weights / weights.sum(-1, keepdims=True)
    joint = (probabilities[0, 2][:, None] * probabilities[:, 3]).ravel()
    counts = np.bincount(found[:, 0] * 7 + found[:, 1], minlength=49)
    assert (counts[joint == 0] == 0).all() and (joint > 0).sum() == top_k**2
    expected = rows * joint[joint > 0]
    statistic = ((counts[joint > 0] - expected) ** 2 / expected).sum()
    assert statistic < 44.3  # the 0.9999 quantile for 15 degrees of freedom


def test_quantized_caches_roll_back():
    model = fold_fusion(_agreeing("fusedkv"))
    split = nnx.split(model)
    state, inputs = _state(model, 16, cache_dtype="int8")
    expected = loop.decode(*split, jax.tree.map(jnp.copy, state), inputs, 99)
    found = SelfSpeculation(exit_layer=2, draft_tokens=3).decode(*split, state, inputs, 99)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_nothing_of_the_draft_is_computed_twice(monkeypatch):
    """Rows that pass each layer in one round: T of one token below the exit, T at once above."""
    model = fold_fusion(_agreeing("fusedkv", num_layers=4, scan_layers=False))
    (graph, params), passed = nnx.split(model), []
    attend = type(model.runs[0][0].attention).attend

    def counted(self, q, *arguments, **options):
        passed.append(q.shape[1])
        return attend(self, q, *arguments, **options)

    monkeypatch.setattr(type(model.runs[0][0].attention), "attend", counted)

    @jax.jit  # counted while it is traced
    def one_round(params, tokens):
        model = nnx.merge(graph, params)
        cache = fkv.KVCache.create(model.config, batch_size=2, max_length=8)
        draft = early_exit.begin_draft(model, cache, 4)
        for place in range(4):
            place = jnp.int32(place)
            _, draft = early_exit.extend_draft(model, draft, tokens, jnp.ones(2, bool), place, 2)
        assert passed == [1] * 2 * 4
        passed.clear()
        count = jnp.full(2, 4, jnp.int32)
        logits, keep = early_exit.verify_draft(model, cache, draft, count, 2)
        assert passed == [4] * 2
        return logits, keep(jnp.asarray([1, 3], jnp.int32)).lengths

    logits, lengths = one_round(params, jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(logits, model(jnp.zeros((2, 4), jnp.int32)), atol=1e-4)
    assert lengths.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        ("mha", {}, "exit_layer=None: all layers cache something.*exits are 1, 2, 3, 4, 5, 6, 7"),
        ("fusedkv", {"exit_layer": 8}, "leaves no layer to verify; exits are 1"),
        ("lckv", {"exit_layer": 4}, "exit_layer=4"),
        ("lckv:forward_passes=1", {"exit_layer": 1, "draft_tokens": 3}, "draft_tokens=3 needs"),
    ],
)
def test_layouts_that_cannot_draft_are_refused(spec, changes, message):
    with pytest.raises(ValueError, match=message):
        fkv.generate(
            small.decoder(small.config(spec)), [[1]], speculation=SelfSpeculation(**changes)
        )


@pytest.mark.parametrize("changes", [{"exit_layer": 0}, {"draft_tokens": -1}])
def test_bad_settings_are_refused(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{name}={value}; use"):
        SelfSpeculation(**changes)


LONG = [
    ("window_hybrid:window=5,full_every=2", 3, None),
    pytest.param("yoco:window=4", 2, None, marks=pytest.mark.slow),
    ("fusedkv", 4, fkv.compression.StreamingLLM(budget=6, sinks=2)),
]


@pytest.mark.parametrize(("spec", "exit_layer", "compression"), LONG)
def test_drafts_may_be_longer_than_a_window(spec, exit_layer, compression):
    """A ring goes round within a draft, and is as it was before for what verifies it."""
    model = _agreeing(spec)
    prompts = [[3], list(range(1, 8)), list(range(30, 57))]
    drafts = SelfSpeculation(exit_layer=exit_layer, draft_tokens=9)
    plain, drafted = (
        fkv.generate(model, prompts, GREEDY, compression=compression, speculation=speculation)
        for speculation in (None, drafts)
    )
    assert [x.token_ids for x in drafted] == [x.token_ids for x in plain]


@pytest.mark.parametrize("exit_layer", [None, 2])
def test_drafts_leave_the_sinks_and_the_ring_of_streaming_llm_as_they_were(exit_layer):
    """Prompts shorter and longer than the budget, one of them than the sinks."""
    model = _agreeing("fusedkv")
    prompts = [list(range(1, 20)), [5, 6], list(range(30, 39))]
    outputs = [
        fkv.generate(
            model,
            prompts,
            GREEDY,
            compression=fkv.compression.StreamingLLM(budget=9, sinks=3),
            speculation=drafts,
        )
        for drafts in (None, SelfSpeculation(exit_layer=exit_layer, draft_tokens=3))
    ]
    plain, speculative = ([c.token_ids for c in found] for found in outputs)
    assert speculative == plain


COMPRESSORS = [
    fkv.compression.SnapKV(budget=4, window=2),
    fkv.compression.PyramidKV(budget=4, window=2, beta=2),
    fkv.compression.PyramidInfer(budget=0.2),
    fkv.compression.MiniCache(budget=4, start=0),
    fkv.compression.DoubleSparsity(budget=4, group_factor=2, dense_layers=0),
    fkv.compression.StreamingLLM(budget=4, sinks=2),
    fkv.compression.H2O(budget=4),
]


def test_the_compressors_are_all_there():
    assert {type(one) for one in COMPRESSORS} == {type(parse(name)) for name in names()}


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda one: one.title)
def test_what_cannot_be_taken_back_is_refused_before_any_work(compressor):
    model = small.decoder(small.config("mha", num_layers=2))
    drafts = SelfSpeculation(exit_layer=1)
    cache = fkv.KVCache.create(model.config, batch_size=1, max_length=16)
    _, cache = fkv.prefill(
        model, small.tokens(1, 12), jnp.asarray([12]), cache, compression=compressor
    )
    if compressor.rewinds:
        early_exit.begin_draft(model, cache, 2)
        fkv.generation.EngineSettings(compression=compressor, speculation=drafts)
        return
    with pytest.raises(ValueError, match="cannot take back .*, or reads it.*without this compress"):
        early_exit.begin_draft(model, cache, 2)
    with pytest.raises(ValueError, match=f"the cache of {compressor.title}; leave one of them out"):
        fkv.generation.EngineSettings(compression=compressor, speculation=drafts)
