"""Prefill in parts: equal to prefill in one piece, with exactly the traffic that it must have."""

import importlib.util
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import fusedkv_jax as fkv
from fusedkv_jax.cache import cache_shardings
from fusedkv_jax.generation.parts import part_ends
from fusedkv_jax.generation.steps import extend_parts
from fusedkv_jax.layouts import KINDS
from fusedkv_jax.model.block import Block
from fusedkv_jax.model.runahead import extend_in_parts
from fusedkv_jax.sharding import MeshConfig, MeshError, make_mesh, serving_shardings
from pallas_kernels.tpu import topology
from tests.model import small

LENGTH, CAPACITY = 24, 32
PARTITIONS = [(14, 15, 20, 24), (8, 16, 24), (1, 2, 24), (22, 23, 24)]
CASES = [
    *((spec, geometry) for spec in ("mha", "fusedkv") for geometry in small.GEOMETRIES),
    *((spec, "gqa") for spec in ("cla:k=2", "yoco", "fusedkv_lite", "yoco_pp", "svformer")),
    ("resformer", "gqa"),
]
UNEVEN = [
    *((*case, ends) for case in CASES for ends in PARTITIONS[:1]),
    *(("fusedkv", geometry, ends) for geometry in ("gqa", "mla") for ends in PARTITIONS[1:]),
    ("mha", "mla", (1, 2, 24)),
]
QUICK = [("fusedkv", "gqa", (14, 15, 20, 24)), ("mha", "mla", (1, 2, 24))]


def mesh_of(parts: int, **axes) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(**{"data": 1, "context": parts, "devices": parts} | axes))


def empty(config, rows=3, dtype=None):
    return fkv.KVCache.create(config, batch_size=rows, max_length=CAPACITY, dtype=dtype)


def close(got, want):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-4, atol=2e-5)


def check(config, ends, mesh, rows=3):
    """Logits and cache of ragged prompts, and of a token after them, as on one device."""
    model, prompts = small.decoder(config), small.tokens(rows, LENGTH)
    lengths = jnp.asarray([LENGTH, 1, 17, 9][:rows], jnp.int32)
    logits, cache = fkv.prefill(model, prompts, lengths, empty(config, rows))
    kept = jax.tree.map(jnp.copy, cache)
    following = jnp.argmax(logits, -1).astype(jnp.int32)
    next_logits, _ = fkv.decode_step(model, following, cache)
    graph, params = nnx.split(model)
    with jax.set_mesh(mesh):
        found, cache = extend_parts(graph, params, prompts, lengths, empty(config, rows), ends)
        jax.tree.map(close, (found, cache), (logits, kept))
        # Every device has all of it.
        for leaf, want in zip(jax.tree.leaves(cache), jax.tree.leaves(kept), strict=True):
            for shard in leaf.addressable_shards:
                close(shard.data, np.asarray(want)[shard.index])
        close(fkv.decode_step(model, following, cache)[0], next_logits)


@pytest.mark.parametrize(
    "spec, geometry, ends",
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in UNEVEN],
)
def test_equals_prefill_in_one_piece(spec, geometry, ends):
    check(small.config(spec, geometry, num_layers=4), ends, mesh_of(len(ends)))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"tensor": 2}, {"data": 2}, {"fsdp": 2}], ids=str)
def test_with_other_axes(axes):
    config = small.config("fusedkv", scan_layers="data" not in axes)
    check(config, (15, 24), mesh_of(2, devices=4, **axes), rows=4)


@pytest.mark.slow
@hypothesis.settings(max_examples=6)
@hypothesis.given(ends=st.sets(st.integers(1, LENGTH - 1), min_size=1, max_size=3))
def test_any_partition(ends):
    ends = (*sorted(ends), LENGTH)
    check(small.config("fusedkv", num_layers=4), ends, mesh_of(len(ends)))


def permuted_bytes(jaxpr, times: int = 1) -> dict[bool, int]:
    """Bytes that all `ppermute` of a program send, down the chain (True) and up (False)."""
    total = {True: 0, False: 0}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ppermute":
            ((source, target),) = equation.params["perm"]
            sent = sum(x.aval.size * x.aval.dtype.itemsize for x in equation.invars)
            assert abs(target - source) == 1
            total[target > source] += times * sent
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            for down, sent in permuted_bytes(inner, times * repeats).items():
                total[down] += sent
    return total


@pytest.mark.parametrize("spec, geometry", CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_traffic_is_exact(spec, geometry, dtype):
    """Each cached stream goes down the chain once: worker i sends the tokens of parts 0 to i."""
    config = small.config(spec, geometry)
    ends, rows = (3, 4, 19, 24), 2
    graph, params = nnx.split(nnx.eval_shape(lambda: fkv.Decoder(config, rngs=nnx.Rngs(0))))

    def run(params, tokens, count, cache):
        return extend_in_parts(nnx.merge(graph, params), tokens, count, cache, ends)

    integers = (
        jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    with jax.set_mesh(mesh_of(4)):
        cache = jax.eval_shape(lambda: empty(config, rows, dtype))
        program = jax.make_jaxpr(run)(params, *integers, cache)
    a_token = 0
    for kind in KINDS:
        heads, channels = config.stream_shapes[kind]
        bytes_of_head = {"bfloat16": 2 * channels, "int8": channels + 4}[dtype]
        a_token += len(config.kv_layout.cached(kind)) * heads * bytes_of_head
    starts = (0, *ends[:-1])
    down, up = sum(starts[1:]), sum(LENGTH - end for end in ends)
    found = permuted_bytes(program.jaxpr)
    assert found == {True: rows * a_token * down, False: rows * a_token * up}
    # Fewer streams than layers where layers share them, and nothing of the upper half's.
    assert fkv.costs.cache_bytes_per_token(config, dtype) == a_token


def test_traffic_of_equal_and_balanced_parts():
    """In tokens: (p - 1) N / 2, and 2.07 N instead of 1.5 N for 4 balanced parts."""
    length = 100_000
    for workers in (2, 4, 8):
        ends = part_ends(length, workers, "equal", tile=1)
        assert sum(ends[:-1]) == (workers - 1) * length / 2
    assert sum(part_ends(length, 4, "balanced", tile=1)[:-1]) == pytest.approx(2.07 * length, 2e-3)


@pytest.mark.parametrize("spec", ["mha", "fusedkv", "cla:k=2"])
def test_rows_per_layer(spec, monkeypatch):
    """A worker runs the largest part's rows where something is cached, and one row above."""
    config = small.config(spec, scan_layers=False, num_layers=4)
    model = nnx.eval_shape(lambda: fkv.Decoder(config, rngs=nnx.Rngs(0)))
    rows = []
    original = Block.project

    def count(self, x, rotation):
        rows.append(x.shape[1])
        return original(self, x, rotation)

    monkeypatch.setattr(Block, "project", count)
    graph, params = nnx.split(model)
    tokens, lengths = jnp.zeros((1, LENGTH), jnp.int32), jnp.full(1, LENGTH, jnp.int32)
    with jax.set_mesh(mesh_of(4)):
        jax.eval_shape(
            lambda params: extend_in_parts(
                nnx.merge(graph, params), tokens, lengths, empty(config, 1), (9, 14, 20, 24)
            ),
            params,
        )
    depth = config.kv_layout.prefill_depth
    assert rows == [10 - 1] * depth + [1] * (4 - depth)


@hypothesis.given(
    workers=st.integers(1, 9),
    extra=st.integers(0, 3000),
    parts=st.sampled_from(["equal", "balanced"]),
    tile=st.sampled_from([1, 16, 128]),
)
def test_named_cuts(workers, extra, parts, tile):
    length = workers + extra
    ends = part_ends(length, workers, parts, tile)
    assert len(ends) == workers
    assert ends[-1] == length
    sizes = np.diff((0, *ends))
    assert (sizes > 0).all()
    while tile * workers > length:
        tile //= 2
    assert all(end % tile == 0 for end in ends[:-1])
    wanted = [
        length * (math.sqrt((i + 1) / workers) if parts == "balanced" else (i + 1) / workers)
        for i in range(workers)
    ]
    if tile == 1 and sizes.min() > 1:
        np.testing.assert_allclose(ends, wanted, atol=0.5)


def test_given_sizes():
    assert part_ends(24, 4, (14, 1, 5, 4)) == (14, 15, 20, 24)
    assert part_ends(24, 3, (2, 1, 1)) == (12, 18, 24)
    assert part_ends(24, 3, (1000, 1, 1)) == (22, 23, 24)
    np.testing.assert_allclose(
        np.diff((0, *part_ends(1000, 4, "balanced", tile=1))), (500, 207, 159, 134), atol=1
    )


@pytest.mark.parametrize("parts", ["half", (1, 2), (1, 2, 0), ()])
def test_cuts_that_cannot_be(parts, without_type_checks):
    with pytest.raises(ValueError, match=r"use equal, balanced, or 3 positive sizes"):
        part_ends(24, 3, parts)


def test_fewer_tokens_than_workers():
    with pytest.raises(ValueError, match="2 tokens cannot be cut into 3 parts"):
        part_ends(2, 3, "equal")


@pytest.mark.parametrize(
    "sizes, parts",
    [
        ((3, 30, 12), "balanced"),
        pytest.param((1, 2), "equal", marks=pytest.mark.slow),  # shorter than there are workers
    ],
)
def test_generate_in_parts(sizes, parts):
    model = small.decoder(small.config("fusedkv", num_layers=4))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, small.VOCAB, size).tolist() for size in sizes]
    greedy = fkv.SamplingParams(temperature=0, max_tokens=4)
    one = fkv.generate(model, prompts, greedy)
    settings = {"mesh": mesh_of(3), "prefill_parts": parts, "bucketing": parts != "equal"}
    assert fkv.generate(model, prompts, greedy, **settings) == one


@pytest.mark.parametrize(
    "spec, settings, message",
    [
        ("mha", {"mesh": None}, "needs a mesh whose context axis takes the parts"),
        ("mha", {"max_num_batched_tokens": 9}, "prefill_parts and max_num_batched_tokens exclude"),
        ("mha", {"prefill_parts": (1, 2, 3)}, "2 positive sizes"),
        ("lckv", {}, "does not serve cyclic layouts"),
        ("window_hybrid:window=5,full_every=2", {}, "does not serve a RingStore"),
        ("mha", {"cache_dtype": "int4"}, "does not serve a KiviStore"),
    ],
)
def test_what_parts_do_not_serve(spec, settings, message):
    model = small.decoder(small.config(spec, max_length=256))
    settings = {"mesh": mesh_of(2), "prefill_parts": "equal"} | settings
    with pytest.raises(ValueError, match=message):
        fkv.generate(model, [[1, 2, 3]], **settings)


def test_prefill_takes_parts_for_an_empty_cache():
    config = small.config("mha", num_layers=2)
    model, tokens, lengths = small.decoder(config), small.tokens(1, 8), jnp.full(1, 8, jnp.int32)
    whole, cache = fkv.prefill(model, tokens, lengths, empty(config, 1))
    with jax.set_mesh(mesh_of(2)):
        found, _ = fkv.prefill(model, tokens, lengths, empty(config, 1), "balanced")
        close(found, whole)
        with pytest.raises(ValueError, match="begins with an empty cache"):
            fkv.prefill(model, tokens, lengths, cache, "balanced")
        with pytest.raises(MeshError, match="3 parts of the prompt need mesh.context=3"):
            extend_in_parts(model, tokens, lengths, empty(config, 1), (2, 4, 8))


def test_rows_that_cannot_be_have_no_logits_in_parts_either():
    """No token, and an id outside the vocabulary that only the program sees."""
    config = small.config("mha", num_layers=2)
    model, lengths = small.decoder(config), jnp.asarray([8, 0, 8], jnp.int32)
    tokens = small.tokens(3, 8).at[2, 3].set(small.VOCAB)
    with jax.set_mesh(mesh_of(2)):
        run = jax.jit(lambda *rows: fkv.prefill(model, *rows, empty(config), "equal"))
        found, cache = run(tokens, lengths)
    assert np.isnan(found).all(1).tolist() == [False, True, True]
    assert np.asarray(cache.overflowed).tolist() == [False, False, True]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_compiles_for_tpus():
    """Four parts and two halves of the heads on eight chips, with the chips' own kernels."""
    devices = topology.slice_devices("v5e:2x4")
    mesh = make_mesh(MeshConfig(data=1, context=4, tensor=2), devices)
    config = fkv.ModelConfig(
        vocab_size=512, num_layers=4, d_model=256, num_heads=4, num_kv_heads=2, head_dim=128,
        d_ff=512, max_length=2048, dtype="bfloat16", layout="fusedkv",
    )  # fmt: skip

    def on_mesh(tree, shardings):
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings
        )

    graph, params = nnx.split(nnx.eval_shape(lambda: fkv.Decoder(config, rngs=nnx.Rngs(0))))
    params = on_mesh(params, serving_shardings(params, mesh))
    cache = jax.eval_shape(lambda: fkv.KVCache.create(config, batch_size=2, max_length=2048))
    cache = on_mesh(cache, cache_shardings(cache, mesh))
    whole = jax.NamedSharding(mesh, jax.P())
    tokens = jax.ShapeDtypeStruct((2, 2048), jnp.int32, sharding=whole)
    count = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=whole)
    ends = part_ends(2048, 4, "balanced")
    with jax.set_mesh(mesh):
        program = extend_parts.lower(graph, params, tokens, count, cache, ends).compile()
    text = program.as_text()
    assert "tpu_custom_call" in text
    for end in ends[:-1]:  # half of two heads of a layer's stream: exactly the part
        assert f"bf16[2,{end},1,128]" in text
