"""ModelConfig: defaults, refusals with the fix named, and the round trip through JSON."""

import dataclasses
import json

import pytest

from fusedkv_jax import layouts
from fusedkv_jax.config import ConfigError, MLAConfig, ModelConfig, RopeConfig
from fusedkv_jax.layouts import LayoutError, named

MLA = MLAConfig(kv_lora_rank=16, nope_dim=8, rope_dim=4, v_dim=6)


def build(**changes) -> ModelConfig:
    fields = dict(vocab_size=50, num_layers=8, d_model=32, num_heads=4, d_ff=48)
    return ModelConfig(**(fields | changes))


def test_defaults_follow_from_the_other_fields():
    config = build()
    assert (config.kv_heads, config.channels) == (4, 8)
    assert config.layout == layouts.get("mha", 8)
    assert config.stream_shapes == {"key": (4, 8), "value": (4, 8)}
    assert build(num_kv_heads=2, head_dim=16).stream_shapes["key"] == (2, 16)


def test_latent_attention_caches_a_latent_and_one_rotary_key():
    assert build(mla=MLA).stream_shapes == {"key": (1, 4), "value": (1, 16)}


def test_a_layout_is_a_name_a_grammar_string_or_data():
    layout = layouts.get("cla", 8, k=4)
    for given in ("cla:k=4", "0x4_4x4", layout):
        assert build(layout=given).layout == layout


def test_configurations_are_frozen_and_hash_by_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        build().d_model = 3
    assert hash(build(layout="yoco")) == hash(build(layout="yoco"))


class TestReplace:
    def test_a_named_layout_follows_the_depth(self):
        config = build(layout="fusedkv:granularity=head").replace(num_layers=12)
        assert config.layout == layouts.get("fusedkv", 12, granularity="head")

    def test_an_explicit_layout_does_not(self):
        with pytest.raises(ValueError, match="8 layers but num_layers=12"):
            build(layout="0_1_2_3_3x4").replace(num_layers=12)

    def test_derived_fields_follow_what_they_derive_from(self):
        assert build().replace(d_model=64).channels == 16
        assert build().replace(num_heads=8).kv_heads == 8
        assert build(num_kv_heads=2, head_dim=16).replace(d_model=64, num_heads=8).channels == 16
        assert build(num_kv_heads=2).replace(num_heads=8).kv_heads == 2

    def test_the_copy_is_validated(self):
        with pytest.raises(ConfigError, match="num_kv_heads=3 does not divide num_heads=4"):
            build().replace(num_kv_heads=3)


class TestRoundTrip:
    @pytest.mark.parametrize("name", [n for n in layouts.names() if n != "window_hybrid"])
    def test_every_layout(self, name):
        config = build(layout=name, rope=RopeConfig(theta=5.0), dtype="bfloat16", remat="dots")
        fields = json.loads(json.dumps(config.to_dict()))
        assert fields["layout"] == name
        assert ModelConfig.from_dict(fields) == config

    def test_options_windows_and_latent_attention(self):
        hybrid = build(num_layers=16, layout="window_hybrid:window=64,rebuild=window")
        for config in (build(mla=MLA, layout="fusedkv:split=2,key_sources=0+1"), hybrid):
            assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    @pytest.mark.parametrize("name", ["yoco", "resformer", "lckv", "fusedkv"])
    def test_a_layout_without_a_name_is_written_out(self, name):
        layout = layouts.KVLayout(layouts.get(name, 8).layers, passes=(3, 1))
        fields = json.loads(json.dumps(build(layout=layout).to_dict()))
        again = ModelConfig.from_dict(fields).layout
        assert (again, again.passes) == (layout, (3, 1))

    def test_a_layout_that_somebody_has_registered_is_read_where_its_name_is_unknown(
        self, monkeypatch
    ):
        with monkeypatch.context() as patched:
            patched.setattr(named, "_REGISTRY", dict(named._REGISTRY))

            @layouts.register
            def mine(num_layers):
                return layouts.parse(f"0x{num_layers}")

            config = build(layout="mine")
            fields = json.loads(json.dumps(config.to_dict()))
        again = ModelConfig.from_dict(fields)
        assert (again, again.kv_layout.spec) == (config, "mine")
        assert json.loads(json.dumps(again.to_dict())) == fields


@pytest.mark.usefixtures("without_type_checks")
class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vocab_size": 0}, "vocab_size=0; use a whole number of at least 1"),
            ({"d_model": "32"}, "d_model='32'; use a whole number of at least 1"),
            ({"num_layers": True}, "num_layers=True; use a whole number of at least 1"),
            ({"num_layers": 4.0}, "num_layers=4.0; use a whole number"),
            ({"norm_eps": float("nan")}, "norm_eps=nan; use a number above 0"),
            ({"layout": 3}, "layout=3; use"),
            ({"rope": {"theta": 3}}, "rope={'theta': 3}; use"),
            ({"norm_eps": -1e-6}, "norm_eps=-1e-06; use a number above 0"),
            ({"num_heads": 5}, "num_heads=5 does not divide d_model=32"),
            ({"num_kv_heads": 3}, "use a divisor of 4"),
            ({"head_dim": 7}, "head_dim=7 is odd"),
            ({"dtype": "float16"}, "dtype='float16'; choose float32, bfloat16"),
            ({"remat": "some"}, "remat='some'; choose none, full, dots, qkv"),
            ({"tie_embeddings": "false"}, "tie_embeddings='false'; use True or False"),
            ({"qk_norm": 1}, "qk_norm=1; use True or False"),
            ({"scan_layers": None}, "scan_layers=None; use True or False"),
            ({"num_kv_heads": 2.0}, "num_kv_heads=2.0; use a whole number of at least 1 or None"),
            ({"num_kv_heads": 0}, "num_kv_heads=0; use a whole number of at least 1 or None"),
            ({"init_std": float("inf")}, "init_std=inf; use a number above 0"),
            ({"attention": None}, "attention=None; use text"),
            ({"mla": 3}, "mla=3; use a MLAConfig or None"),
        ],
    )
    def test_fields(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            build(**changes)

    def test_parts(self):
        with pytest.raises(ConfigError, match="scaling='ntk'; choose none, linear, llama3, yarn"):
            RopeConfig(scaling="ntk")
        with pytest.raises(ConfigError, match="factor=0; use a number above 0"):
            RopeConfig(factor=0)
        with pytest.raises(ConfigError, match="mscale=nan; use a number"):
            RopeConfig(mscale=float("nan"))
        with pytest.raises(ConfigError, match="high_freq_factor=1.0; use more than low_freq"):
            RopeConfig(scaling="llama3", high_freq_factor=1.0)
        with pytest.raises(ConfigError, match="rope_dim=3 is odd"):
            dataclasses.replace(MLA, rope_dim=3)
        with pytest.raises(ConfigError, match="q_lora_rank=-1; use a whole number of at least 0"):
            dataclasses.replace(MLA, q_lora_rank=-1)

    def test_layouts(self):
        with pytest.raises(LayoutError, match="did you mean fusedkv"):
            build(layout="fusedkw")
        with pytest.raises(ConfigError, match="layout has 6 layers but num_layers=8"):
            build(layout=layouts.get("yoco", 6))

    @pytest.mark.parametrize(
        "name", ["fusedkv_lite", "svformer", "svformer_half", "resformer", "lite_learnable"]
    )
    def test_latent_attention_shares_keys_and_values_together(self, name):
        with pytest.raises(ConfigError, match="but MLA holds both in one latent; choose"):
            build(mla=MLA, layout=name)

    def test_fields_of_a_dictionary(self):
        fields = build().to_dict()
        with pytest.raises(ConfigError, match="unknown field d_modle; did you mean d_model"):
            ModelConfig.from_dict(fields | {"d_modle": 3})
        with pytest.raises(ConfigError, match=r"unknown field rope.thet; did you mean theta"):
            ModelConfig.from_dict(fields | {"rope": {"thet": 3}})
        with pytest.raises(ConfigError, match="missing field mla.rope_dim"):
            ModelConfig.from_dict(fields | {"mla": {"kv_lora_rank": 2, "nope_dim": 2, "v_dim": 2}})
        del fields["d_ff"]
        with pytest.raises(ConfigError, match="missing field d_ff"):
            ModelConfig.from_dict(fields)
