"""Engines whose steps several devices share."""

import dataclasses
import types

import jax
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.cache import paged
from tests.model import small
from tests.serving.served import GREEDY, PAGES, all_tokens, prompts, run
from tests.serving.served import engine as one

SPLIT = dict(tensor_parallel_size=4)


def model_(spec="fusedkv", geometry="mha", **changes):
    sizes = dict(num_layers=4, d_model=16, d_ff=16)
    heads = dict(num_kv_heads=4, head_dim=8) if geometry == "mha" else {}
    return small.decoder(small.config(spec, geometry, **{**sizes, **heads, **changes}))


@pytest.mark.slow
def test_four_devices_answer_as_one_does():
    model = model_()
    given = prompts(16)
    sampled = fkv.SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=8)
    params = [GREEDY, dataclasses.replace(GREEDY, logprobs=2), sampled, GREEDY] * 4
    served = one(model, num_pages=24, **SPLIT)
    found = run(served, given, params)
    assert all_tokens(found) == all_tokens(run(one(model, num_pages=24), given, params))
    for pool in jax.tree.leaves(served.runner.pool):
        assert len(pool.sharding.device_set) == 4
        assert pool.addressable_shards[0].data.size * 4 == pool.size, "a part on each"


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec, changes, settings",
    [
        ("fusedkv", {"num_kv_heads": 2}, {}),  # two devices have one KV head
        ("cla:k=2", {}, {"cache_dtype": "int8"}),
        ("lckv", {}, {"num_pages": None}),  # in slots
        ("fusedkv", {"geometry": "mla"}, {}),  # every device has the latents
        ("fusedkv", {}, {"speculation": fkv.SelfSpeculation(draft_tokens=3)}),
        ("fusedkv", {}, {"speculation": fkv.NGramSpeculation(draft_tokens=3)}),
    ],
)
def test_heads_that_are_shared_codes_slots_latents_and_drafts(spec, changes, settings):
    model, given = model_(spec, **changes), prompts(8)
    split = one(model, **{"num_pages": PAGES, **settings}, **SPLIT)
    whole = one(model, **{"num_pages": PAGES, **settings})
    assert all_tokens(run(split, given, GREEDY)) == all_tokens(run(whole, given, GREEDY))


@pytest.mark.slow
def test_codes_in_tiles_are_split_as_those_of_whole_pages(monkeypatch):
    """A TPU's pool, whose codes have an axis more, on devices that are none."""
    model, given = model_("fusedkv"), prompts(4)
    settings = {"cache_dtype": "int8", "page_size": 32, "num_pages": 16}
    whole = run(one(model, **settings), given, GREEDY)
    monkeypatch.setattr(paged, "choice", types.SimpleNamespace(device=lambda: ("tpu", "")))
    split = one(model, **settings, **SPLIT)
    codes = split.runner.pool.keys.data
    assert codes.ndim == 5
    assert codes.addressable_shards[0].data.shape[-1] * 4 == codes.shape[-1]
    assert all_tokens(run(split, given, GREEDY)) == all_tokens(whole)


def test_more_devices_than_there_are_and_a_mesh_of_others_are_refused():
    with pytest.raises(ValueError, match="there are 8 devices"):
        one(model_(), tensor_parallel_size=9)
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        with pytest.raises(ValueError, match="a mesh is set, and an engine makes its own"):
            one(model_())
