"""Presets: parameter totals that the models' publishers print, and the paper's sizes."""

import pytest

from fusedkv_jax import costs, presets
from fusedkv_jax.config import ConfigError, ModelConfig, RopeConfig
from fusedkv_jax.data.tokenizers import ByteTokenizer
from fusedkv_jax.layouts import LayoutError

# Totals of the safetensors files on the model hub.
PUBLISHED = {
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "llama2_7b": 6_738_415_616,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "tinyllama_1_1b": 1_100_048_384,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_public_geometries_have_the_published_parameters(name):
    assert costs.parameter_count(presets.get(name, layout="mha")) == PUBLISHED[name]


def test_deepseek_v2_has_the_published_parameters_once_its_experts_are_put_in():
    config = presets.get("deepseek_v2_dense", layout="mha")
    expert_width, experts = 1536, 160 + 2
    moe = 3 * config.d_model * expert_width * experts + config.d_model * 160
    dense = 3 * config.d_model * config.d_ff
    assert costs.parameter_count(config) + 59 * (moe - dense) == 235_741_434_880


@pytest.mark.parametrize(
    ("name", "millions", "removed"),
    [
        ("332m", 332.4, 12.6),
        ("650m", 649.6, 37.7),
        ("1_5b", 1495.3, 100.7),
        ("4b", 3961.0, 235.9),
    ],
)
def test_the_papers_sizes(name, millions, removed):
    config = presets.get(name, layout="mha")
    parts = costs.parameter_breakdown(config)
    # The paper's count has one embedding matrix and no norms.
    counted = sum(parts.values()) - parts["head"] - parts["norms"]
    assert round(counted / 1e6, 1) == millions
    assert parts["head"] == parts["embedding"] == 128_000 * config.d_model
    fused = costs.parameter_breakdown(presets.get(name))
    streams = parts["keys"] + parts["values"] - fused["keys"] - fused["values"]
    assert round(streams / 1e6, 1) == removed


def test_llama2_7b_caches_512_kib_a_token():
    config = presets.get("llama2_7b", layout="mha")
    assert costs.cache_bytes_per_token(config, "float16") == 512 * 1024
    assert costs.cache_bytes(config, 1, 32_768, "float16") == 16 * 2**30


def test_the_papers_latent_attention_caches_a_quarter():
    config = presets.get("650m_mla", layout="mha")
    assert costs.cache_bytes_per_token(config, "bfloat16") == 16 * (736 + 32) * 2
    fused = presets.get("650m_mla")
    assert costs.cache_bytes_per_token(fused, "bfloat16") == 8 * (736 + 32) * 2


def test_the_demo_fits_the_byte_tokenizer():
    config = presets.get("demo")
    assert config.vocab_size == ByteTokenizer.vocab_size
    assert costs.parameter_count(config) < 5e6


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_takes_the_default_layout_and_survives_json(name):
    config = presets.get(name)
    assert config.kv_layout.spec == "fusedkv"
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_llama3_scales_its_rotation():
    rope = presets.get("llama3_2_1b").rope
    assert rope == RopeConfig(theta=500_000.0, scaling="llama3", factor=32.0, original_length=8192)


def test_overrides_reach_the_configuration():
    config = presets.get("332m", "yoco", num_kv_heads=4, num_layers=6, rope={"theta": 5e4})
    assert (config.kv_heads, config.kv_layout.num_layers, config.rope.theta) == (4, 6, 5e4)
    assert config.kv_layout.cached_keys == (0, 1, 2)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("332", {}, "unknown preset '332'; did you mean 332m"),
        ("gpt", {}, "unknown preset 'gpt'; choose demo, 332m"),
        ("qwen3_8", {}, "did you mean qwen3_8b"),
        ("demo", {"num_kv_head": 2}, "unknown field num_kv_head; did you mean num_kv_heads"),
        ("demo", {"num_kv_heads": 4}, "num_kv_heads=4 does not divide num_heads=6"),
    ],
)
def test_mistakes_are_named(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        presets.get(name, **overrides)


def test_a_layout_that_does_not_fit_is_refused():
    with pytest.raises(LayoutError, match="num_layers=7 is odd"):
        presets.get("demo", num_layers=7)
