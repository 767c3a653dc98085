"""Analytic costs against the papers' formulas and the arrays of the model and its cache."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fusedkv_jax import Decoder, KVCache, costs, layouts, presets
from fusedkv_jax.config import ConfigError, MLAConfig, ModelConfig

D, N, K, H, F, V, L = 48, 6, 3, 10, 64, 97, 12
STREAM = D * K * H  # parameters of one key or value projection


def build(layout="mha", **changes) -> ModelConfig:
    fields = dict(
        vocab_size=V,
        num_layers=L,
        d_model=D,
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        d_ff=F,
        layout=layout,
        qk_norm=False,
    )
    return ModelConfig(**(fields | changes))


# Head geometries; MHA with tied embeddings and GQA with norms on queries and keys.
GEOMETRIES = {
    "mha": dict(num_kv_heads=N, tie_embeddings=True),
    "gqa": dict(qk_norm=True),
    "mla": dict(mla=MLAConfig(kv_lora_rank=14, nope_dim=8, rope_dim=6, v_dim=9)),
    "mla_q": dict(mla=MLAConfig(kv_lora_rank=14, nope_dim=8, rope_dim=6, v_dim=9, q_lora_rank=11)),
}
SPECS = (
    *(name for name in layouts.names() if name != "window_hybrid"),
    "window_hybrid:full_every=3,window=5",
    "window_hybrid:full_every=3,window=5,upper=fusedkv_lite",
    "window_hybrid:full_every=3,window=5,rebuild=window",
    "yoco:window=4",
    "lckv:target=middle",
    "fusedkv:granularity=scalar",
    "fusedkv:granularity=head",
    "fusedkv:granularity=shared_channel",
    "fusedkv:parameterization=iterative",
    "fusedkv:split=8,key_sources=1+3+7,value_sources=2",
    "1_2s_0_3x9",
)


def every_config():
    for spec in SPECS:
        for geometry, fields in GEOMETRIES.items():
            try:
                yield pytest.param(build(spec, **fields), id=f"{spec}-{geometry}")
            except ConfigError:
                assert geometry.startswith("mla")


CONFIGS = list(every_config())


class TestParameters:
    @pytest.mark.parametrize("config", CONFIGS)
    def test_count_is_that_of_the_model(self, config):
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
        assert sum(math.prod(x.shape) for x in leaves) == costs.parameter_count(config)

    def test_breakdown_of_a_plain_decoder(self):
        assert costs.parameter_breakdown(build()) == {
            "embedding": V * D,
            "head": V * D,
            "queries": L * D * N * H,
            "keys": L * STREAM,
            "values": L * STREAM,
            "outputs": L * N * H * D,
            "feed_forward": L * 3 * D * F,
            "norms": (2 * L + 1) * D,
            "mixing": 0,
        }

    @pytest.mark.parametrize(
        ("spec", "removed"),
        [
            # METHODS 2.1, column "removed", with 6 of 12 layers caching.
            ("cla:k=5", 2 * STREAM * (L - 3)),
            ("mlkv:m=4", 2 * STREAM * (L - 4)),
            ("yoco", L * STREAM),
            ("yoco:window=4", (L // 2 - 1) * 2 * STREAM - D),
            ("lckv:w=2", 2 * STREAM * (L - 3)),
            ("dense_fusion", L * STREAM - 2 * 6 * 6),
            ("fusedkv", L * STREAM - 3 * K * H * 6),
            ("fusedkv:granularity=shared_channel", L * STREAM - 3 * H * 6),
            ("fusedkv_lite", L * STREAM),
            ("lite_reversed", L * STREAM),
            ("lite_learnable", L * STREAM - 3 * K * H * 6 // 2),
            ("yoco_pp", L * STREAM - 4 * 5),
            ("resformer", -(L - 1)),
            ("svformer", (L - 1) * STREAM),
            ("svformer_half", L * STREAM),
        ],
    )
    def test_removed_against_a_layer_of_its_own_each(self, spec, removed):
        ordinary = costs.parameter_count(build())
        assert ordinary - costs.parameter_count(build(spec)) == removed

    def test_fusedkv_on_latent_attention_drops_down_projections_and_their_norms(self):
        mla = MLAConfig(kv_lora_rank=14, nope_dim=8, rope_dim=6, v_dim=9)
        ordinary, fused = (costs.parameter_count(build(s, mla=mla)) for s in ("mha", "fusedkv"))
        mixing = 6 * 2 * (14 + 3)  # one weight per rotary pair
        assert ordinary - fused == 6 * (D * (14 + 6) + 14) - mixing


class TestCache:
    @pytest.mark.parametrize("config", CONFIGS)
    def test_bytes_are_those_of_the_arrays(self, config):
        for length in (3, 40):  # shorter and longer than the windows
            cache = KVCache.create(config, batch_size=2, max_length=length, dtype=jnp.bfloat16)
            arrays = jax.tree.leaves((cache.keys, cache.values))
            assert costs.cache_bytes(config, 2, length) == sum(x.nbytes for x in arrays)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "float8_e5m2", "int4"])
    @pytest.mark.parametrize("spec", ["mha", "fusedkv", "svformer", "yoco:window=200"])
    def test_bytes_of_every_storage_type(self, spec, dtype):
        mla = MLAConfig(kv_lora_rank=16, nope_dim=8, rope_dim=6, v_dim=9)
        geometries = [{"head_dim": 24}] + [{"mla": mla}] * (spec != "svformer")
        for config in (build(spec, **geometry) for geometry in geometries):
            for length in (100, 159, 160, 300):  # int4 begins at 160
                cache = KVCache.create(config, batch_size=2, max_length=length, dtype=dtype)
                held = sum(x.nbytes for x in jax.tree.leaves(cache.stores))
                assert costs.cache_bytes(config, 2, length, dtype) == held == cache.nbytes

    def test_four_bits(self):
        """Keys: 4 bits and 32 for 32 tokens of a channel; values: and 32 for 32 channels."""
        config = build(head_dim=64)
        assert costs.cache_bytes_per_token(config, "int4") == L * 2 * K * 64 * 5 // 8
        # 169 of 297 tokens before the last: in groups of 32, 160 of them are quantized.
        reads = costs.decode_cache_reads(config, 298, "int4")
        assert reads == L * 2 * K * (160 * 64 * 5 // 8 + 138 * 64 * 4)

    def test_per_token(self):
        assert costs.cache_bytes_per_token(build(), "float32") == L * 2 * K * H * 4
        assert costs.cache_bytes_per_token(build("svformer"), "int8") == (L + 1) * K * (H + 4)
        assert costs.cache_bytes_per_token(build("lckv:w=4")) == 5 * 2 * K * H * 2

    @pytest.mark.parametrize(
        ("options", "percent"),
        [(":upper=mha", 29.7), (":rebuild=window", 27.3), ("", 14.8)],
    )
    def test_window_hybrids_at_8192_tokens(self, options, percent):
        hybrid = presets.get("650m", "window_hybrid" + options)
        full = presets.get("650m", "mha")
        ratio = costs.cache_bytes(hybrid, 1, 8192) / costs.cache_bytes(full, 1, 8192)
        assert round(100 * ratio, 1) == percent

    @pytest.mark.parametrize(
        ("spec", "streams"),
        [
            ("mha", 2 * L),
            ("cla:k=3", 2 * L),
            ("yoco", 2 * L),
            ("fusedkv_lite", 2 * L),
            ("lite_learnable", 2 * L),
            ("yoco_pp", 2 * L),
            ("svformer", 2 * L),
            ("svformer_half", 2 * L),
            ("fusedkv", 3 * L),
            ("dense_fusion", 2 * (6 + 6 * 6)),
        ],
    )
    def test_reads_are_those_of_the_table(self, spec, streams):
        reads = costs.decode_cache_reads(build(spec), 100, "bfloat16")
        assert reads == streams * K * H * 100 * 2

    def test_windows_read_their_window_only(self):
        config = build("yoco:window=16")
        for length in (10, 100):
            reads = costs.decode_cache_reads(config, length, "int8")
            assert reads == (L // 2) * 2 * K * (H + 4) * (length + min(16, length))

    def test_cyclic_layers_do_not_read_the_token_itself(self):
        reads = costs.decode_cache_reads(build("lckv:w=2"), 100, "int8")
        assert reads == 2 * K * (H + 4) * (100 * L - 9)

    def test_latent_attention_reads_its_latent_once(self):
        mla = MLAConfig(kv_lora_rank=14, nope_dim=8, rope_dim=6, v_dim=9)
        assert costs.decode_cache_reads(build(mla=mla), 7, "float16") == L * (14 + 6) * 7 * 2
        fused = costs.decode_cache_reads(build("fusedkv", mla=mla), 8, "float16")
        assert fused == L * (14 + 6) * 12 * 2

    def test_an_unknown_dtype_is_named(self):
        with pytest.raises(ValueError, match="dtype='bf16' is no dtype; use bfloat16"):
            costs.cache_bytes_per_token(build(), "bf16")


class TestPublishedComplexity:
    """METHODS 3.5, attention's share of the FLOPs: h = N * H = D, and S tokens."""

    S, G, hd = 50, 2, 8
    h = 6 * hd

    def config(self, layout):
        return build(layout, num_kv_heads=self.G, head_dim=self.hd)

    @pytest.mark.parametrize(
        ("layout", "bracket"),
        [
            ("mha", 4 * S + 4 * h + 4 * G * hd),
            ("yoco", 4 * S + 4 * h + 2 * G * hd),
            ("fusedkv_lite", 4 * S + 4 * h + 2 * G * hd),
            ("fusedkv", 4 * S + 4 * h + 2 * G * hd + 3 * S * G / 6),
        ],
    )
    def test_decode(self, layout, bracket):
        rest = L * 6 * D * F + 2 * D * V
        found = costs.decode_flops(self.config(layout), self.S) - rest
        assert found == L * self.h * bracket

    @pytest.mark.parametrize(
        ("layout", "bracket", "once"),
        [
            ("mha", 4 * S + 4 * h + 4 * G * hd, 0),
            ("yoco", 2 * S + 2 * h + 2 * G * hd + 2, 2 * L * h * h),
            ("fusedkv_lite", 2 * S + 2 * h + 2 * G * hd + 2, 2 * L * h * h),
            ("fusedkv", 2 * S + 2 * h + 2 * G * hd + 2 + 3 * G / 6, 2 * L * h * h),
        ],
    )
    def test_prefill(self, layout, bracket, once):
        config, S = self.config(layout), self.S
        depth = config.kv_layout.prefill_depth
        rest = (S * depth + L - depth) * 6 * D * F + 2 * D * V
        # The papers count every pair of tokens, we count the visible ones.
        hidden = depth * 4 * self.h * (S * S - S * (S + 1) // 2)
        found = costs.prefill_flops(config, S) - rest + hidden
        assert found == L * S * self.h * bracket + once


class TestTraining:
    def test_three_forward_passes_of_the_model_flops(self):
        matrices = L * (2 * D * N * H + 2 * STREAM + 3 * D * F) + V * D
        forward = 2 * matrices + L * 4 * N * H * (64 + 1) / 2
        assert costs.train_flops_per_token(build(), 64) == 3 * forward
        assert costs.train_flops_per_token(build(tie_embeddings=True), 64) == 3 * forward

    def test_windows_count_what_they_show(self):
        seen = [min(t + 1, 7) for t in range(30)]
        full = [t + 1 for t in range(30)]
        layers = "_".join(f"{i}s7" for i in range(L))
        saved = costs.train_flops_per_token(build(), 30) - costs.train_flops_per_token(
            build(layers), 30
        )
        assert saved == pytest.approx(3 * L * 4 * N * H * (sum(full) - sum(seen)) / 30)

    def test_cyclic_layouts_go_back_through_the_last_passes_only(self):
        def flops(forward, backward):
            spec = f"lckv:w=2,forward_passes={forward},backward_passes={backward}"
            return costs.train_flops_per_token(build(spec), 16)

        one_pass = flops(1, 1) - flops(0, 1)
        assert flops(7, 1) - flops(0, 1) == pytest.approx(7 * one_pass)
        assert flops(0, 3) - flops(0, 1) == pytest.approx(2 * 3 * one_pass)
        # Ten layers iterate, one of them reads its own tokens, the others those before.
        matrices = 10 * (2 * D * N * H + 3 * D * F) + 2 * STREAM
        visible = (9 * 15 + 17) / 2
        assert one_pass == pytest.approx(2 * matrices + 4 * N * H * visible)

    def test_fusion_counts_two_products_and_a_sum_per_element(self):
        fused, reused = (
            costs.train_flops_per_token(build(s), 16) for s in ("fusedkv", "fusedkv_lite")
        )
        assert fused - reused == pytest.approx(3 * 6 * 2 * 3 * K * H)


class TestSummary:
    @pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
    @pytest.mark.parametrize("length", [100, 300])
    def test_the_ratio_is_to_a_model_with_as_many_heads(self, dtype, length):
        mla = MLAConfig(kv_lora_rank=16, nope_dim=8, rope_dim=6, v_dim=9)
        twin = build(head_dim=24, num_kv_heads=N)
        whole = costs.cache_bytes(twin, 1, length, dtype)
        for changes in ({}, {"mla": mla}, {"layout": "yoco:window=40"}):
            config = build(**({"head_dim": 24} | changes))
            ratio = costs.summary(config, length, dtype)["cache_ratio"]
            assert ratio == costs.cache_bytes(config, 1, length, dtype) / whole

    @pytest.mark.parametrize(
        ("width", "heads", "dtype", "whole"),
        [
            (45, 3, "bfloat16", L * 2 * 300 * 45 * 2),  # 15 channels, of which no pairs rotate
            (50, 5, "int8", L * 2 * 300 * 5 * (10 + 4)),
            # 10 channels a head fill up to 16; 160 tokens have 4 bits, with 32 of scales for 32
            # tokens of a key's channel and for a value's 16 channels, and 160 are exact.
            (50, 5, "int4", L * 5 * (160 * (16 + 16 / 8 + 4) + 2 * 160 * 16 * 4)),
        ],
    )
    def test_heads_that_no_ordinary_model_could_have(self, width, heads, dtype, whole):
        mla = MLAConfig(kv_lora_rank=16, nope_dim=8, rope_dim=6, v_dim=9)
        fields = dict(num_heads=heads, num_kv_heads=None, head_dim=None)
        config = build(d_model=width, mla=mla, **fields)
        found = costs.summary(config, 300, dtype)
        assert found["cache_ratio"] == costs.cache_bytes(config, 1, 300, dtype) / whole


@pytest.mark.parametrize("length", [100, 300])
def test_int4_is_refused_at_every_length_where_the_cache_refuses_it(length):
    config = build(head_dim=10)
    with pytest.raises(ValueError, match="needs values whose channels, here 10") as refused:
        KVCache.create(config, batch_size=1, max_length=length, dtype="int4")
    with pytest.raises(ValueError) as error:
        costs.cache_bytes(config, 1, length, "int4")
    assert str(error.value) == str(refused.value)
