"""What the engine answers: the same as `generate`, whatever runs beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import fusedkv_jax as fkv
from experiments.benchmarks.programs import counted_compilations
from fusedkv_jax.costs import cache_bytes_per_token
from fusedkv_jax.serving import POLICIES, Policy, ServingSettings, StepShapes
from tests.model import small
from tests.serving.served import (
    GREEDY,
    LONGEST,
    PAGE,
    PAGES,
    SHAPES,
    Json,
    Letters,
    all_tokens,
    engine,
    model,
    odd_params,
    prompts,
    run,
    tokens,
)


@pytest.fixture(scope="module")
def expected():
    """Greedy outputs of `prompts(24)`, by `generate`."""
    return [c.token_ids for c in fkv.generate(model(), prompts(24), GREEDY)]


class Chunks(Policy):
    """Prompts come in chunks of so many tokens."""

    def __init__(self, size):
        self.size = size

    def budget(self, request, view):
        return self.size


def test_greedy_outputs_are_those_of_generate(expected):
    found = run(engine(), prompts(24), GREEDY)
    assert all_tokens(found) == expected
    assert all(deltas[-1].finish_reason == "length" for deltas in found.values())


@pytest.mark.parametrize(
    "spec, geometry",
    [
        *((spec, "gqa") for spec in ("cla:k=2", "resformer")),
        ("fusedkv", "mla"),
        *(
            pytest.param(spec, "gqa", marks=pytest.mark.slow)
            for spec in ("mha", "yoco", "fusedkv_lite")
        ),
    ],
)
def test_every_token_is_the_likeliest_after_all_before_it(spec, geometry):
    """By one pass over whole sequences, without any cache."""
    given, shapes = prompts(24), dataclasses.replace(SHAPES, mixed_rows=(8,))
    model_ = model(spec, geometry)
    found = all_tokens(run(engine(model_, shapes=shapes), given, GREEDY))
    whole = np.zeros((24, LONGEST), np.int32)
    for row, (prompt, output) in enumerate(zip(given, found, strict=True)):
        whole[row, : len(prompt) + len(output)] = [*prompt, *output]
    likeliest = np.argmax(model_(jnp.asarray(whole)), axis=-1)
    for row, (prompt, output) in enumerate(zip(given, found, strict=True)):
        assert len(output) == GREEDY.max_tokens
        first = len(prompt) - 1
        assert likeliest[row, first : first + len(output)].tolist() == list(output)


@pytest.mark.parametrize("size", [1, 7, 16])
def test_chunks_of_any_size_are_the_whole(size, expected):
    assert all_tokens(run(engine(policy=Chunks(size)), prompts(24), GREEDY)) == expected


def test_rows_pass_through_the_layers_that_they_must(expected):
    """All tokens once through the lower layers, drawn ones alone through the upper."""
    served = engine(enable_prefix_caching=False)
    given = prompts(24)
    run(served, given, GREEDY)
    stats, drawn = served.stats(), sum(map(len, expected))
    assert stats.preemptions == 0
    assert stats.upper_rows == stats.generated_tokens == drawn
    assert stats.lower_rows == sum(map(len, given)) + drawn - len(given)


def test_a_prefix_that_is_found_changes_nothing(expected):
    served, given = engine(num_pages=PAGES), prompts(24)[:6]
    first = run(served, given, GREEDY)
    second = run(served, given, GREEDY)
    assert all_tokens(first) == all_tokens(second) == expected[:6]
    for prompt, deltas in zip(given, second.values(), strict=True):
        assert deltas[0].cached_tokens == (len(prompt) - 1) // PAGE * PAGE or len(prompt) < PAGE
        assert deltas[0].prompt_tokens == len(prompt)
    served.add(given[0], GREEDY, request_id="x", tenant="another")
    assert [deltas for _ in range(2) for deltas in served.step()][0][1].cached_tokens == 0


@pytest.mark.parametrize("how", ["recompute", "swap"])
def test_a_pool_of_little_more_than_one_request_serves_all(how, expected):
    """Who gives up pages goes on as if nothing had been."""
    policy = POLICIES["fcfs"](on_eviction=how)
    small_pool = dict(num_pages=11, policy=policy, host_pages=200 * (how == "swap"))
    served = engine(**small_pool)
    assert all_tokens(run(served, prompts(24), GREEDY)) == expected
    assert served.stats().preemptions > 0
    if how == "swap":
        assert served.stats().lower_rows < sum(map(len, prompts(24))) + sum(map(len, expected))


def test_requests_that_wait_in_host_memory_go_on_as_if_nothing_had_been(expected):
    """Prompts take the pages of those who have time to spare."""
    policy = POLICIES["layer_kv"](tpot=1e3, spare=1e-9)
    served = engine(num_pages=16, host_pages=400, policy=policy)
    assert all_tokens(run(served, prompts(24), GREEDY)) == expected
    assert served.stats().preemptions > 20


def test_draws_are_those_of_generate_at_any_row_and_load():
    letters, given, params = Letters(), prompts(24), odd_params() * 4
    alone = fkv.generate(model(), given, params, tokenizer=letters)
    found = run(engine(tokenizer=letters), given, params)
    for completion, deltas in zip(alone, found.values(), strict=True):
        assert tokens(deltas) == completion.token_ids
        assert "".join(d.text for d in deltas) == completion.text
        assert deltas[-1].finish_reason == completion.finish_reason
        assert deltas[-1].stop_reason == completion.stop_reason
        for place, own in zip(
            [p for d in deltas for p in d.logprobs or ()], completion.logprobs or [], strict=True
        ):
            assert place.keys() == own.keys()
            assert all(abs(place[t].logprob - own[t].logprob) < 1e-4 for t in own)


def test_prompts_are_scored_as_by_the_full_forward(expected):
    given = [*prompts(24)[:7], [3]]
    tokens_ = np.zeros((8, LONGEST), np.int32)
    for row, prompt in enumerate(given):
        tokens_[row, : len(prompt)] = prompt
    whole = np.asarray(jax.nn.log_softmax(jax.jit(model())(tokens_).astype(jnp.float32)))
    served = engine()
    run(served, given, GREEDY)  # their prefixes are there, and must not be skipped
    scored = dataclasses.replace(GREEDY, prompt_logprobs=2)
    before = served.stats().upper_rows
    for number, prompt in enumerate(given):
        served.add(prompt, scored if number % 3 < 2 else GREEDY, request_id=str(number))
    found = {str(number): [] for number in range(8)}
    deltas = served.step()
    served.scheduler.restart(0.0)  # everybody begins again
    while served.unfinished:
        deltas += served.step()
    for name, delta in deltas:
        found[name].append(delta)
    for row, prompt in enumerate(given):
        assert row == 7 or tokens(found[str(row)]) == expected[row]
        first, *others = [delta.prompt_logprobs for delta in found[str(row)]]
        assert not any(others) and (first is None) == (row % 3 == 2)
        for place, (entries, token) in enumerate(
            zip(first or (), prompt, strict=first is not None)
        ):
            if place == 0:
                assert entries is None
                continue
            assert 2 <= len(entries) <= 3 and token in entries
            for other, entry in entries.items():
                assert abs(entry.logprob - whole[row, place - 1, other]) < 1e-4
                assert (
                    entry.rank == 1 + (whole[row, place - 1] > whole[row, place - 1, other]).sum()
                )
    rows = sum(len(prompt) - 1 for number, prompt in enumerate(given) if number % 3 < 2)
    assert served.stats().upper_rows - before >= rows, "upper layers run for all that is scored"


def test_outputs_of_one_prompt_share_its_pages_and_are_independent():
    params = fkv.SamplingParams(n=4, temperature=1.0, seed=11, max_tokens=10)
    for prompt in prompts(24)[:3]:  # some end within a page
        served = engine()
        served.add(prompt, params, request_id="a")
        found = served.step()
        assert [d.index for _, d in found] == [0, 1, 2, 3]
        assert served.stats().pages_used == -(-len(prompt) // PAGE)
        deltas = [d for _, d in found]
        while served.unfinished:
            deltas += [d for _, d in served.step()]
        for i in range(4):
            own = dataclasses.replace(params, n=1, seed=11 + i)
            assert tokens(deltas, i) == tokens(run(engine(), [prompt], own)["0"])


def test_the_first_of_several_outputs_may_end_with_its_first_token():
    params = fkv.SamplingParams(n=4, temperature=1.0, seed=11, max_tokens=6)
    prompt = prompts(1)[0]
    whole = run(engine(), [prompt], params)["0"]
    first = tokens(whole)[0]
    found = run(engine(), [prompt], dataclasses.replace(params, stop_token_ids=[first]))["0"]
    for i in range(4):
        own = tokens(whole, i)
        cut = own.index(first) + 1 if first in own else len(own)
        assert tokens(found, i) == own[:cut]


def test_a_stop_text_ends_an_output_and_is_not_shown():
    letters, prompt = Letters(), prompts(1)[0]
    text = "".join(d.text for d in run(engine(tokenizer=letters), [prompt], GREEDY)["0"])
    stop = text[3:5]
    params = dataclasses.replace(GREEDY, stop=stop)
    deltas = run(engine(tokenizer=letters), [prompt], params)["0"]
    assert "".join(d.text for d in deltas) == text[: text.index(stop)]
    assert deltas[-1].finish_reason == "stop" and deltas[-1].stop_reason == stop


def test_nan_ends_its_own_requests_and_stays_in_its_own_pages(expected):
    broken = nnx.clone(model())
    broken.embedding[...] = broken.embedding[...].at[60].set(jnp.nan)
    served = engine(broken)
    served.runner.pool = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), served.runner.pool)
    given = prompts(24)[:8]
    given[2], given[5] = [*given[2], 60], [60] * 9
    found = run(served, given, GREEDY)
    for number, deltas in enumerate(found.values()):
        if number in (2, 5):
            assert deltas[-1].finish_reason == "error" and "not finite" in deltas[-1].error
            assert "prompt 0" not in deltas[-1].error
        else:
            assert tokens(deltas) == expected[number]


def test_a_step_that_raises_ends_its_own_requests(expected):
    served, given = engine(max_num_seqs=8), prompts(24)
    works, calls = served.runner.start, []

    def fails_once(plan, draws):
        calls.append(plan)
        if len(calls) == 3:
            served.runner.pool = None  # as if it had been donated
            raise RuntimeError("out of memory")
        return works(plan, draws)

    served.runner.start = fails_once
    found = run(served, given, GREEDY)
    failed = {r.name for r in calls[2].requests}
    assert 0 < len(failed) < len(given)
    for name, deltas in found.items():
        if name in failed:
            assert "was in a step that failed with RuntimeError" in deltas[-1].error
        else:
            assert tokens(deltas) == expected[int(name)]


def test_nothing_compiles_after_warm_up():
    shapes = StepShapes((2, 4), (0, 4), (2, 6), 8)
    sizes = dict(max_num_seqs=4, max_num_batched_tokens=16, num_pages=20)
    served = engine(tokenizer=Json(), shapes=shapes, **sizes)
    assert served.warm_up() == 6
    form = fkv.StructuredOutputsParams(regex="[a-z]{2,5}")
    held = fkv.SamplingParams(n=2, seed=1, structured_outputs=form, prompt_logprobs=1)
    params = [*odd_params()[:4], GREEDY, fkv.SamplingParams(n=3, seed=1), held]
    with counted_compilations() as seconds:
        for number, prompt in enumerate(prompts(40)):
            served.add(prompt, params[number % 7], request_id=str(number))
            if number % 5 == 4:
                served.abort(str(number - 2))
            served.step()
        while served.unfinished:
            served.step()
    assert len(seconds) == 0
    assert served.stats().pages_used == 0


def test_the_pool_is_as_large_as_the_formula_and_fusedkv_holds_twice_the_sequences():
    pages = {}
    for spec in ("mha", "fusedkv"):
        config = small.config(spec)
        settings = ServingSettings(kv_cache_memory_bytes=2**20, max_num_seqs=2**14)
        pages[spec] = settings.pages(config)
        page = settings.page_size * cache_bytes_per_token(config, config.dtype)
        assert 2**20 - page < pages[spec] * page <= 2**20
    assert pages["fusedkv"] >= 1.95 * pages["mha"]
    served = engine()
    per_token = cache_bytes_per_token(served.config, served.config.dtype)
    assert served.runner.pool.nbytes == PAGES * PAGE * per_token


@pytest.mark.parametrize(
    "prompt, changes, message",
    [
        ([], {}, "is empty"),
        ([1] * LONGEST, {}, f"max_model_len={LONGEST} is the limit"),
        ([1] * 20, {"max_tokens": 30}, "can come to 50 tokens, prompt 20 and max_tokens"),
        ([61], {}, "token id 61; ids are 0 to 60"),
        ([1], {"logprobs": 21}, "use 0 to max_logprobs=20"),
        ([1], {"prompt_logprobs": -1}, "has prompt_logprobs=-1; use 0 to max_logprobs=20"),
        ([1], {"stop_token_ids": [*range(17)]}, "the engine has room for 16"),
        ([1], {"stop": "a"}, "pass tokenizer="),
    ],
)
def test_what_can_never_be_served_is_refused(prompt, changes, message):
    served = engine()
    with pytest.raises(ValueError, match=message):
        served.add(prompt, dataclasses.replace(GREEDY, **changes), request_id="a")
    assert not served.unfinished


def test_a_name_that_runs_is_refused_and_is_free_again_after_an_abort():
    served = engine()
    served.add([1, 2], GREEDY, request_id="a")
    with pytest.raises(ValueError, match="'a' runs already"):
        served.add([1, 2], GREEDY, request_id="a")
    served.step()
    (name, delta), *_ = served.abort("a")
    assert (name, delta.finish_reason) == ("a", "abort")
    assert served.stats().pages_used == 0 and served.abort("a") == []
    served.add([1, 2], GREEDY, request_id="a")


def test_settings_that_cannot_be_are_refused(without_type_checks):
    for policy in ("fifo", POLICIES["fcfs"], [], None):
        with pytest.raises(ValueError, match="^policy=.*; use a policy, or one of"):
            ServingSettings(policy=policy)
    for compression in ("snapkv:budget=4", fkv.compression.SnapKV):
        with pytest.raises(ValueError, match="^compression=.*; use a compressor"):
            ServingSettings(compression=compression)
    with pytest.raises(ValueError, match="the pool holds 20: lower it"):
        engine(num_pages=5)
    with pytest.raises(ValueError, match="a page takes"):
        engine(num_pages=None, kv_cache_memory_bytes=10)


def test_a_model_on_several_devices_is_refused():
    everywhere = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec())
    spread = nnx.clone(model())
    nnx.update(spread, jax.device_put(nnx.state(spread), everywhere))
    with pytest.raises(ValueError, match="spread over 2 devices, and the engine serves from one"):
        engine(spread)


def test_llm_generates_and_chats_as_generate_does(expected):
    letters = Letters()
    llm = fkv.LLM(model(), tokenizer=letters, **_llm_settings())
    given = prompts(24)[:5]
    found = llm.generate(given, GREEDY)
    assert [c.token_ids for c in found] == expected[:5]
    assert found == fkv.generate(model(), given, GREEDY, tokenizer=letters)
    with pytest.raises(ValueError, match="chat needs a tokenizer and a template"):
        llm.chat([{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match="has no setting 'num_blocks'"):
        fkv.LLM(model(), num_blocks=3)


def _llm_settings():
    settings = dataclasses.asdict(engine().settings)
    return settings | {"shapes": engine().settings.shapes}


def test_shapes_hold_any_plan_within_the_budget():
    rng = np.random.default_rng(0)
    for _ in range(200):
        seqs = int(rng.integers(1, 100))
        budget = seqs + int(rng.integers(0, 1000))
        shapes = StepShapes.choose(seqs, budget)
        counts = []
        while len(counts) < seqs and sum(counts) < budget:
            counts.append(int(rng.integers(1, min(budget - sum(counts), 60) + 1)))
        parts = sum(-(-count // shapes.chunk) for count in counts if count > 1)
        rows, chunk_rows = shapes.fit(len(counts), parts)
        assert rows >= len(counts) and chunk_rows >= parts
