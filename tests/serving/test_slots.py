"""Engines whose caches lie in slots: what cannot be paged is served, and answers as `generate`."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import fusedkv_jax as fkv
from experiments.benchmarks.programs import counted_compilations
from fusedkv_jax.cache import KVCache
from fusedkv_jax.cache.kivi import KiviStore
from fusedkv_jax.cache.stores import RingStore
from fusedkv_jax.compression import (
    H2O,
    DoubleSparsity,
    MiniCache,
    PyramidInfer,
    PyramidKV,
    SnapKV,
    StreamingLLM,
)
from fusedkv_jax.serving import Policy, ServingSettings
from fusedkv_jax.serving.cache_form import CacheForm
from tests.model import small
from tests.serving.served import GREEDY, LONGEST, Letters, all_tokens, model, prompts, run, tokens
from tests.serving.served import engine as paged

WINDOWS = "0s5_1s5_2s5_f0+1s5"
CYCLIC = "lckv"  # of 9 passes: longer prompts are not exact, so that cuts would show
HYBRID = "0s5_1_0s5_1"


def engine(model_=None, **changes):
    sizes = dict(num_pages=None, max_num_seqs=4, max_num_batched_tokens=24)
    return paged(model_ or model(CYCLIC), **{**sizes, **changes})


class Chunks(Policy):
    """Wants prompts in chunks."""

    def budget(self, request, view):
        return 7


def given():
    """Prompts of which some have more tokens than the layout has passes, for one program."""
    return prompts(10, longest=17)


@pytest.fixture(scope="module")
def expected():
    return _generated(model(CYCLIC), given())


def _generated(model_, prompts_, **settings):
    return [c.token_ids for c in fkv.generate(model_, prompts_, GREEDY, **settings)]


def test_a_cyclic_layout_answers_as_generate_does(expected, caplog):
    with caplog.at_level(logging.INFO, "fusedkv_jax"):
        served = engine(policy=Chunks())
    begun = []
    served.watch = lambda plan: begun.extend(
        count
        for request, count in zip(plan.requests, plan.counts, strict=True)
        if not request.computed
    )
    assert (
        "caches lie in 4 slots of 40 tokens and share no prefixes; prompts are not" in caplog.text
    )
    assert all_tokens(run(served, given(), GREEDY)) == expected
    assert served.stats().pages_total == 4
    assert sorted(begun) == sorted(map(len, given())), "no prompt was cut"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("resformer", "window_hybrid") else pytest.mark.slow)
        for name in small.SPECS
    ],
)
def test_pages_and_slots_answer_as_generate_does(name):
    """Every layout, also those whose options `model` has not; a cyclic one has slots alone."""
    config = small.config(small.SPECS[name], "gqa", num_layers=8, d_model=16, d_ff=16)
    model_, asked = small.decoder(config), prompts(16)
    expected = _generated(model_, asked)
    assert len(set(expected)) > 8
    for memory in ("pages", "slots") if not config.kv_layout.is_cyclic else ("auto",):
        assert all_tokens(run(engine(model_, memory=memory), asked, GREEDY)) == expected, memory
    if config.kv_layout.is_cyclic:
        with pytest.raises(ValueError, match="slots"):
            engine(model_, memory="pages")


@pytest.mark.slow
def test_outputs_of_one_prompt_part_into_slots_of_their_own(expected):
    """Of the slots there are as many as outputs, and others run beside."""
    letters, served = Letters(), engine(tokenizer=Letters())
    several = fkv.SamplingParams(n=3, temperature=1.0, seed=11, max_tokens=10, logprobs=2)
    first, *others = given()[0], *given()
    found = run(served, [first, *others], [several, *[GREEDY] * 10])
    assert all_tokens(found)[1:] == expected
    (alone,) = fkv.generate(model(CYCLIC), [first], several, tokenizer=letters)
    for i in range(3):
        assert tokens(found["0"], i) == alone.outputs[i].token_ids
    assert served.stats().preemptions > 0, "who gave up a slot has answered as if it had not"


@pytest.mark.slow
def test_prompts_are_scored_in_slots(expected):
    some = given()[:3]
    scored = dataclasses.replace(GREEDY, prompt_logprobs=1)
    found = run(engine(), some, [scored, GREEDY, scored])
    assert all_tokens(found) == expected[:3]
    for row in (0, 2):
        (alone,) = fkv.generate(model(CYCLIC), [some[row]], scored)
        for place, own in zip(
            found[str(row)][0].prompt_logprobs[1:], alone.prompt_logprobs[1:], strict=True
        ):
            assert place.keys() == own.keys()
            assert all(abs(place[t].logprob - own[t].logprob) < 1e-4 for t in own)


def test_nan_stays_in_its_slot_and_leaves_it_with_its_request(expected):
    broken, some = nnx.clone(model(CYCLIC)), given()
    known = {token for tokens_ in (*some, *expected) for token in tokens_}
    bad = next(token for token in range(61) if token not in known)
    broken.embedding[...] = broken.embedding[...].at[bad].set(jnp.nan)
    served = engine(broken)
    served.runner.pool = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        served.runner.pool,
    )
    some[1], some[4] = [*some[1], bad], [bad] * 9
    for number, deltas in enumerate(run(served, some, GREEDY).values()):
        if number in (1, 4):
            assert deltas[-1].finish_reason == "error" and "not finite" in deltas[-1].error
        else:
            assert tokens(deltas) == expected[number]


@pytest.mark.slow
def test_nothing_compiles_after_warm_up():
    served = engine()
    assert served.warm_up() == 4
    varied = [
        GREEDY,
        fkv.SamplingParams(n=2, seed=1, max_tokens=10),
        dataclasses.replace(GREEDY, logprobs=1),
    ]
    varied.append(dataclasses.replace(GREEDY, prompt_logprobs=1))
    with counted_compilations() as seconds:
        run(served, prompts(12), varied * 3)
    assert len(seconds) == 0


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fcfs", "priority", "mlfq", "vtc"])
def test_policies_that_take_slots_away_change_nothing(policy, expected):
    served = engine(policy=policy, max_num_seqs=2)
    found = {str(number): [] for number in range(10)}
    for number, prompt in enumerate(given()):
        names = dict(request_id=str(number), priority=-number, tenant=str(number % 3))
        served.add(prompt, GREEDY, **names)
        _collect(served.step(), found)
    while served.unfinished:
        _collect(served.step(), found)
    assert all_tokens(found) == expected
    assert served.stats().pages_used == 0
    assert policy != "priority" or served.stats().preemptions > 0


def _collect(deltas, found):
    for name, delta in deltas:
        found[name].append(delta)


@pytest.mark.parametrize(
    "spec, settings, longest",
    [
        pytest.param(WINDOWS, {}, 28, marks=pytest.mark.slow),
        pytest.param(HYBRID, {"memory": "slots"}, 28, marks=pytest.mark.slow),
        pytest.param("fusedkv", {"cache_dtype": "int4"}, 200, marks=pytest.mark.slow),
        pytest.param(
            "fusedkv", {"cache_dtype": "int8", "memory": "slots"}, 28, marks=pytest.mark.slow
        ),
    ],
)
def test_chunks_in_slots_answer_as_generate_does(spec, settings, longest):
    model_ = small.decoder(
        small.config(spec, "gqa", num_layers=4, d_model=16, d_ff=16, max_length=256)
    )
    some = prompts(6, longest=longest)
    served = engine(model_, max_model_len=longest + 12, **settings)
    held = {type(store) for store in served.runner.pool.cache.stores}
    assert held & {RingStore, KiviStore} or settings.get("cache_dtype") == "int8"
    found = all_tokens(run(served, some, GREEDY))
    assert found == _generated(model_, some, cache_dtype=settings.get("cache_dtype"))


def test_the_form_of_a_cache_follows_from_layout_window_and_type():
    def form(spec, **settings):
        settings = {"kv_cache_memory_bytes": 2**20, "max_model_len": LONGEST} | settings
        config = small.config(spec, num_layers=4)
        return CacheForm.choose(config, ServingSettings(max_num_seqs=4, **settings))

    assert form("fusedkv").kind == form(HYBRID).kind == "pages"
    assert form(WINDOWS).kind == form("mha", memory="slots").kind == "slots"
    assert form(WINDOWS, num_pages=9).kind == form(WINDOWS, memory="pages").kind == "pages"
    assert form(WINDOWS, max_model_len=9).kind == "pages", "rings would hold nearly all"
    assert form("mha", cache_dtype="int4").kind == "slots"
    cyclic = form(CYCLIC)
    assert cyclic.whole_prompts and not form(WINDOWS).whole_prompts
    assert "cyclic" in str(cyclic) and cyclic.count == 4 and cyclic.size == LONGEST
    assert form(CYCLIC, kv_cache_memory_bytes=2**15).count < 4


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"memory": "pages"}, "is cyclic: .* in one piece"),
        ({"num_pages": 5}, "num_pages=5 is for pages, and caches lie in slots"),
        ({"host_pages": 5}, "host_pages=5 is for pages"),
        ({"kv_cache_memory_bytes": 100}, "a slot of 40 tokens takes .* lower max_model_len"),
    ],
)
def test_settings_that_slots_cannot_have_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        engine(**settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "compressor, spec, longest",
    [
        (SnapKV(budget=8, window=4), "fusedkv", 28),
        (StreamingLLM(budget=8, sinks=2), "fusedkv", 28),
        (H2O(budget=8), "fusedkv", 28),
        # These derive something from the columns, which are 32 in `generate` as well.
        (PyramidKV(budget=8, window=4), "fusedkv", 20),
        (PyramidInfer(budget=0.2), "mha", 20),
        (MiniCache(budget=0.1), "mha", 20),
        (DoubleSparsity(budget=8, dense_layers=1), "mha", 20),
    ],
    ids=lambda value: getattr(value, "title", None),
)
def test_compressed_prompts_answer_as_generate_does(compressor, spec, longest):
    """Some prompts are shorter than the budget, some than a chunk, others pass in several."""
    some, model_ = [prompt[:longest] for prompt in prompts(8)], model(spec)
    settings = dict(compression=compressor, max_output_len=12, max_model_len=longest + 12)
    served = engine(model_, **settings)
    assert "shrinks what prompts leave" in str(served.runner.form)
    several = fkv.SamplingParams(n=2, seed=1, max_tokens=6)
    found = run(served, [*some, some[7]], [*[GREEDY] * 8, several])
    answers = all_tokens(found)
    assert answers[:8] == _generated(model_, some, compression=compressor)
    if compressor.title != "PyramidInfer":  # which makes too little of a difference here
        assert answers[:8] != _generated(model_, some)
    own = dataclasses.replace(several, n=1, seed=2)
    assert tokens(found["8"], 1) == tokens(run(served, [some[7]], own)["0"])
    if longest == 28:
        plain = KVCache.create(served.config, batch_size=4, max_length=LONGEST)
        assert served.runner.pool.cache.nbytes < 0.75 * plain.nbytes


@pytest.mark.parametrize("compressor", [MiniCache(), PyramidInfer(), DoubleSparsity()])
def test_compressors_of_other_layouts_are_refused(compressor):
    with pytest.raises(ValueError, match=rf"^{compressor.title}[: ].*; (use|lower)"):
        engine(model(), compression=compressor)


def test_what_compressors_leave_no_room_for_is_refused():
    served = engine(model(), compression=SnapKV(budget=8, window=4), max_output_len=6)
    for changes, message in (
        ({}, "has max_tokens=12; max_output_len=6 is the limit"),
        ({"max_tokens": 2, "prompt_logprobs": 1}, "need all of a prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            served.add([1], dataclasses.replace(GREEDY, **changes), request_id="a")
    with pytest.raises(ValueError, match="memory='pages' and compression"):
        engine(model(), compression=SnapKV(budget=8), memory="pages")
