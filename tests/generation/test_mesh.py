"""Generation on meshes of virtual devices: the tokens of one device, and a cache that stays put."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fusedkv_jax as fkv
from experiments.benchmarks.programs import counted_compilations
from fusedkv_jax.cache import cache_shardings
from fusedkv_jax.compression import parse
from fusedkv_jax.generation.programs import GenerationPrograms
from fusedkv_jax.sharding import MeshConfig, MeshError, make_mesh
from tests.model import small

GREEDY = fkv.SamplingParams(temperature=0, max_tokens=5)
MESHES = {
    "data": MeshConfig(),
    "tensor": MeshConfig(data=1, tensor=4, devices=4),
    "product": MeshConfig(data=2, fsdp=2, tensor=2),
    "context": MeshConfig(data=1, context=2, tensor=2, devices=4),
}
LAYOUTS = [
    *((spec, "gqa") for spec in ("mha", "cla:k=2", "yoco", "fusedkv", "fusedkv_lite")),
    ("mha", "mla"),
    ("fusedkv", "mla"),
    ("window_hybrid:window=5,full_every=2,upper=mha", "gqa"),
]
CASES = [
    *((*layout, "product") for layout in LAYOUTS),
    *((*layout, "tensor") for layout in (("mha", "gqa"), ("mha", "mla"), ("fusedkv", "gqa"))),
    *(("fusedkv", geometry, "context") for geometry in ("gqa", "mla")),
    ("fusedkv", "gqa", "data"),
]
QUICK = {("fusedkv", "gqa", "product")}


def prompts(count: int = 5) -> list[list[int]]:
    """Of different lengths, all with the same 17 tokens first."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, small.VOCAB, 17).tolist()
    return [prefix + rng.integers(0, small.VOCAB, 1 + 3 * i).tolist() for i in range(count)]


def tokens(model, params=GREEDY, **settings):
    found = fkv.generate(model, prompts(), params, **settings)
    return [[output.token_ids for output in completion.outputs] for completion in found]


def model_of(spec: str, geometry: str = "gqa", **changes) -> fkv.Decoder:
    return small.decoder(small.config(spec, geometry, **{"num_layers": 4} | changes))


@pytest.mark.parametrize(
    "spec, geometry, mesh",
    [
        pytest.param(*case, id="-".join(case), marks=[] if case in QUICK else pytest.mark.slow)
        for case in CASES
    ],
)
def test_same_tokens_as_one_device(spec, geometry, mesh):
    """With a shared prefix, chunks, and 5 rows, which divide over no mesh; compiled once."""
    model = model_of(spec, geometry)
    settings = {"max_num_batched_tokens": 32, "bucketing": False}
    one = tokens(model, **settings)
    assert len({str(found) for found in one}) > 2
    settings["mesh"] = make_mesh(MESHES[mesh])
    assert tokens(model, **settings) == one
    with counted_compilations() as seconds:
        assert tokens(model, **settings) == one
    assert not seconds
    assert jax.sharding.get_mesh().empty


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"cache_dtype": "int8"},
        {"cache_dtype": "int4"},
        {"speculation": fkv.SelfSpeculation(draft_tokens=2)},
        {"compression": parse("snapkv:budget=16,window=8")},
        {"compression": parse("h2o:budget=16")},
        {"compression": parse("double_sparsity:budget=12")},
    ],
    ids=lambda settings: "-".join(map(str, settings.values()))[:40],
)
def test_same_tokens_with_every_kind_of_store(settings):
    spec = "mha" if "Sparsity" in str(settings) else "fusedkv"
    model = model_of(spec, max_length=256)
    one = tokens(model, **settings)
    assert tokens(model, mesh=make_mesh(MESHES["product"]), **settings) == one


@pytest.mark.slow
def test_drawn_tokens_several_outputs_streams_and_beams():
    model = model_of("fusedkv")
    mesh = make_mesh(MESHES["product"])
    drawn = fkv.SamplingParams(
        temperature=0.8, top_p=0.9, repetition_penalty=1.1, n=3, seed=1, max_tokens=5
    )
    one = tokens(model, drawn)
    assert tokens(model, drawn, mesh=mesh) == one
    with jax.set_mesh(mesh):
        assert tokens(model, drawn) == one
    explicit = jax.sharding.Mesh(mesh.devices, mesh.axis_names, (AxisType.Explicit,) * 4)
    assert tokens(model, drawn, mesh=explicit) == one
    streamed: dict[int, list[int]] = {number: [] for number in range(5)}
    for delta in fkv.stream(model, prompts(), GREEDY, stream_interval=2, mesh=mesh):
        assert jax.sharding.get_mesh().empty  # the caller's code is not under the mesh
        streamed[delta.prompt] += list(delta.token_ids)
    assert [[tuple(found)] for found in streamed.values()] == tokens(model)
    beams = fkv.BeamSearchParams(beam_width=3, max_tokens=4)
    found = [fkv.beam_search(model, prompts(), beams, **on) for on in ({}, {"mesh": mesh})]
    texts = [[[o.token_ids for o in c.outputs] for c in completions] for completions in found]
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("fresh_compilation")
def test_decode_loop_moves_no_cache_between_devices():
    """Between devices go sums over heads and hidden units, and whether all rows have ended."""
    rows, length, mesh = 8, 512, make_mesh(MeshConfig(data=4, tensor=2))
    config = small.config("fusedkv", num_layers=4, max_length=length)
    programs = GenerationPrograms.abstract(config, mesh)
    program = programs.lower_decode(rows, length).compile()
    cache = programs.cache_shapes(rows, length)
    pattern = r"= \(?(\w+)\[([\d,]*)\]\S* (all-gather|all-to-all|collective-\w+|all-reduce)"
    found = re.findall(pattern, program.as_text())
    assert {kind for *_, kind in found} == {"all-reduce"}
    # Of a device's rows, one token each.
    assert {shape for dtype, shape, _ in found if dtype == "f32"} == {f"2,1,{config.d_model}"}
    assert {shape for dtype, shape, _ in found if dtype != "f32"} == {""}
    own = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) / mesh.size
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= own
    assert memory.temp_size_in_bytes < 3 * own  # of two layers: four streams that one layer reads


def test_cache_shardings():
    mesh = make_mesh(MESHES["product"])
    rows = ("data", "fsdp")

    def specs(config, mesh=mesh, batch_size=8, dtype=None):
        cache = jax.eval_shape(
            lambda: fkv.KVCache.create(config, batch_size=batch_size, max_length=256, dtype=dtype)
        )
        found = cache_shardings(cache, mesh)
        assert jax.tree.structure(found) == jax.tree.structure(cache)
        assert found.lengths.spec == P(None if batch_size == 3 else rows)
        return {place.spec for place in jax.tree.leaves(found.stores)}

    gqa = small.config("fusedkv", max_length=256)
    for dtype in ("float32", "int8", "int4"):
        assert specs(gqa, dtype=dtype) == {P(None, rows, None, "tensor", None)}
    assert specs(gqa, batch_size=3) == {P(None, None, None, "tensor", None)}
    mla = small.config("fusedkv", "mla", max_length=256)
    assert specs(mla) == {P(None, rows, None, None, None)}  # one latent for all heads


def test_meshes_that_cannot_be_used():
    model = model_of("mha")
    with pytest.raises(MeshError, match="generation needs data, fsdp, context, tensor"):
        tokens(model, mesh=jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,)))
