"""The plugin of tpu-inference: folded attention over one array a layer is ours over many.

What needs tpu-inference itself (vLLM on TPU, in an environment of its own) is skipped without it.
"""

import dataclasses
import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fusedkv_jax.config import ConfigError
from fusedkv_jax.interop import save_huggingface
from fusedkv_jax.interop.tpu_inference import fold
from fusedkv_jax.interop.tpu_inference.model import FusedKVForCausalLM
from fusedkv_jax.interop.tpu_inference.plugin import cache_fields
from pallas_kernels.tpu.topology import slice_devices
from tests.model import small

THERE = importlib.util.find_spec("tpu_inference") is not None
theirs = pytest.mark.skipif(not THERE, reason="tpu-inference is not installed")
SPECS = ("mha", "yoco", "fusedkv", "fusedkv_lite", "lite_learnable:init=normal", "resformer")


def config(spec, **changes):
    return small.config(spec, num_layers=6, head_dim=24, **changes)


def asked(settings, folder=""):
    """vLLM's configuration, as far as a model reads it."""
    hf_config = types.SimpleNamespace(fusedkv=dataclasses.asdict(settings))
    model = types.SimpleNamespace(hf_config=hf_config, dtype=jnp.float32, model=folder)
    return types.SimpleNamespace(model_config=model)


class Plain(FusedKVForCausalLM):
    """With attention written out: a cache is [S, 2, K, W], and holds one sequence."""

    def attention(self, cache, q, k, v, metadata, mesh, size, **options):
        assert options["attn_logits_soft_cap"] is None
        positions = metadata.input_positions
        if options["update_kv_cache"]:
            cache = cache.at[positions].set(jnp.stack([k, v], axis=1))
        keys, values = (jnp.repeat(cache[:, i], q.shape[1] // k.shape[1], axis=1) for i in (0, 1))
        scores = jnp.einsum("tnh,snh->nts", q, keys) * options["sm_scale"]
        seen = jnp.arange(len(cache)) <= positions[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30))
        return cache, jnp.einsum("nts,snh->tnh", weights, values)


@pytest.mark.parametrize(
    "spec", [pytest.param(s, marks=() if s == "fusedkv" else pytest.mark.slow) for s in SPECS]
)
def test_folded_attention_is_ours(spec, tmp_path):
    settings = config(spec)
    ours = small.decoder(settings)
    save_huggingface(ours, tmp_path, format="fusedkv") if False else save_huggingface(
        ours, tmp_path
    )
    model = Plain(asked(settings, tmp_path), jax.random.key(0), None)
    model.load_weights(jax.random.key(0))
    fields, found = cache_fields(settings), fold(settings)
    tokens = np.random.default_rng(0).integers(0, small.VOCAB, 24)
    caches = [jnp.zeros((24, 2, settings.kv_heads, 128)) for _ in range(len(found.records))]
    wide = fields["global_head_dim"]
    assert wide == 24 * max(record.width for record in found.records) <= 128
    assert fields["num_kv_shared_layers"] == settings.num_layers - len(caches)
    states = []
    for start, stop in ((0, 9), (9, 10), (10, 24)):
        metadata = types.SimpleNamespace(input_positions=jnp.arange(start, stop))
        ids = jnp.asarray(tokens[start:stop], jnp.int32)
        caches, x, _, _ = model(caches, ids, metadata)
        states.append(x)
    logits = model.compute_logits(jnp.concatenate(states))
    np.testing.assert_allclose(logits, ours(jnp.asarray(tokens[None], jnp.int32))[0], atol=1e-4)


@pytest.mark.parametrize("spec", ["cla:k=2", "lckv:forward_passes=14", "yoco:window=4"])
def test_what_its_kernel_cannot_express_is_refused(spec):
    with pytest.raises(ConfigError, match="tpu-inference .*use experiments.serve"):
        fold(config(spec))


def batch(steps, table, positions_of):
    """Their metadata of a step: (computed, new) tokens of each sequence."""
    from tpu_inference.layers.common.attention_metadata import AttentionMetadata

    starts = np.cumsum([0] + [new for _, new in steps])
    return AttentionMetadata(
        input_positions=jnp.concatenate([positions_of(*step) for step in steps]),
        block_tables=jnp.asarray(table.reshape(-1), jnp.int32),
        seq_lens=jnp.asarray([done + new for done, new in steps], jnp.int32),
        query_start_loc=jnp.asarray(starts, jnp.int32),
        request_distribution=jnp.asarray([0, 0, len(steps)], jnp.int32),
    )


def pages(settings, count, size, dtype):
    from tpu_inference.kernels.ragged_paged_attention.v3.kernel import get_kv_cache_shape

    widths = [settings.channels * record.width for record in fold(settings).records]
    return [
        jnp.zeros(get_kv_cache_shape(count, size, settings.kv_heads, width, dtype), dtype)
        for width in widths
    ]


@theirs
@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_their_reference_function_gives_our_logits(spec, tmp_path):
    from tpu_inference.kernels.ragged_paged_attention.v3.kernel import ref_ragged_paged_attention

    class Reference(FusedKVForCausalLM):
        def attention(self, cache, q, k, v, metadata, mesh, size, **options):
            out, cache = ref_ragged_paged_attention(
                *(q, k, v, cache, metadata.seq_lens, metadata.block_tables),
                *(metadata.query_start_loc, metadata.request_distribution),
                sm_scale=options["sm_scale"],
            )
            return cache, out

    settings = config(spec)
    ours = small.decoder(settings)
    save_huggingface(ours, tmp_path)
    model = Reference(asked(settings, tmp_path), jax.random.key(0), None)
    model.load_weights(jax.random.key(0))
    draw = np.random.default_rng(1)
    texts = [draw.integers(0, small.VOCAB, length) for length in (21, 30)]
    caches, table = pages(settings, 16, 4, jnp.float32), draw.permutation(16).reshape(2, 8)
    found = [[], []]
    done = np.zeros(2, int)
    for news in ((13, 7), (1, 16), (7, 7)):  # prompts, a decode beside a chunk, both
        steps = list(zip(done.tolist(), news, strict=True))
        metadata = batch(steps, table, lambda at, new: jnp.arange(at, at + new))
        parts = [text[at : at + new] for text, (at, new) in zip(texts, steps, strict=True)]
        ids = jnp.asarray(np.concatenate(parts), jnp.int32)
        caches, x, _, _ = model(caches, ids, metadata)
        logits = model.compute_logits(x)
        found[0].append(logits[: news[0]])
        found[1].append(logits[news[0] :])
        done += news
    for text, logits in zip(texts, found, strict=True):
        expected = ours(jnp.asarray(text[None], jnp.int32))[0]
        np.testing.assert_allclose(jnp.concatenate(logits), expected, atol=1e-4)


@theirs
def test_it_is_registered_and_sizes_its_pages(tmp_path):
    from tpu_inference.models.common.kv_share import compute_kv_share_map
    from tpu_inference.models.common.model_loader import _get_model_architecture
    from tpu_inference.utils import get_layer_kv_params
    from transformers import AutoConfig

    from fusedkv_jax.interop.tpu_inference import register

    register()
    save_huggingface(small.decoder(config("fusedkv")), tmp_path)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert _get_model_architecture(theirs) is FusedKVForCausalLM
    assert compute_kv_share_map(theirs) == {3: 2, 4: 2, 5: 2}
    sizes = [get_layer_kv_params(theirs, kind) for kind in theirs.layer_types]
    assert sizes == [(24, 2), (24, 2), (48, 2), (48, 2), (48, 2), (48, 2)]


@theirs
@pytest.mark.slow
@pytest.mark.parametrize("spec", ["mha", "fusedkv", "fusedkv_lite"])
def test_it_compiles_for_v5e(spec, monkeypatch):
    """With their kernel, by libtpu: heads of 128 channels, records of 256."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel, tuned_block_sizes

    for module in (kernel, tuned_block_sizes):  # they ask the machine that compiles
        monkeypatch.setattr(module, "get_tpu_version", lambda: 5)
    mesh = Mesh(
        np.array(slice_devices("v5e:1x1")[:1]).reshape(1, 1, 1), ("data", "attn_dp", "model")
    )
    whole = NamedSharding(mesh, PartitionSpec())
    settings = small.config(
        spec, num_layers=6, d_model=512, num_heads=8, num_kv_heads=2, head_dim=128, d_ff=512
    )
    given = asked(settings)
    given.model_config.dtype = jnp.bfloat16
    model = nnx.eval_shape(lambda: FusedKVForCausalLM(given, jax.random.key(0), mesh))
    graph, state = nnx.split(model)
    steps = [(100, 1)] * 8 + [(0, 56)]
    metadata = batch(steps, np.arange(9 * 8), lambda at, new: jnp.arange(at, at + new))
    arguments = state, pages(settings, 72, 16, jnp.bfloat16), jnp.zeros(64, jnp.int32), metadata

    def step(state, caches, ids, metadata):
        model = nnx.merge(graph, state)
        caches, x, _, _ = model(caches, ids, metadata)
        return caches, model.compute_logits(x)

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=1).lower(*jax.tree.map(abstract, arguments))
    text = lowered.compile().as_text()
    assert text.count("tpu_custom_call") >= settings.num_layers
