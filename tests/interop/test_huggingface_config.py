"""config.json to `ModelConfig` and back: both spellings, refusals, round trips."""

import dataclasses
import json
import math

import pytest

import fusedkv_jax as fkv
from fusedkv_jax.config import BlockConfig, ConfigError
from fusedkv_jax.interop import config_from_huggingface, config_to_huggingface
from fusedkv_jax.model.rotary import magnitude
from tests.oracles.decoder import small_config

MINIMAL = dict(
    model_type="llama",
    vocab_size=37,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
LATENT = dict(
    model_type="deepseek_v3",
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    first_k_dense_replace=3,
    n_routed_experts=4,
)
SCALING = dict(
    rope_type="llama3",
    factor=4.0,
    original_max_position_embeddings=32,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
LINEAR = dict(rope_type="linear", factor=2.0)


def test_config_of_both_generations():
    """transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters."""
    old = config_from_huggingface(MINIMAL | dict(rope_theta=100.0, rope_scaling=SCALING))
    new = config_from_huggingface(MINIMAL | dict(rope_parameters=SCALING | dict(rope_theta=100.0)))
    assert old == new
    assert new.rope == fkv.RopeConfig(theta=100.0, scaling="llama3", factor=4.0, original_length=32)
    plain = config_from_huggingface(MINIMAL | dict(torch_dtype="bfloat16"))
    assert (plain.rope, plain.param_dtype) == (fkv.RopeConfig(), "bfloat16")
    assert (plain.num_kv_heads, plain.head_dim, plain.qk_norm) == (2, 8, False)


@pytest.mark.parametrize(
    "fields",
    [
        dict(model_type="gpt_neox", rotary_pct=0.5, rotary_emb_base=100),  # Pythia's spelling
        dict(model_type="gpt_neox"),
        dict(model_type="phi3", partial_rotary_factor=0.5, rope_theta=100.0, pad_token_id=0),
        dict(model_type="gemma2", sliding_window=4),
        dict(model_type="gemma3_text", sliding_window=4, sliding_window_pattern=3),
        dict(model_type="qwen2", sliding_window=4, use_sliding_window=True, max_window_layers=1),
        dict(model_type="smollm3", sliding_window=4, use_sliding_window=True),
        dict(model_type="smollm3", no_rope_layer_interval=2),
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_what_a_file_leaves_out_is_what_transformers_assumes(fields):
    """A file of transformers 4 is read as transformers 5 reads it, and writes it in full."""
    transformers = pytest.importorskip("transformers")
    given = MINIMAL | dict(num_hidden_layers=6, num_key_value_heads=4) | fields
    whole = transformers.AutoConfig.for_model(**given).to_dict()
    assert config_from_huggingface(given) == config_from_huggingface(whole)


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"]
)
def test_a_missing_number_of_kv_heads_is_that_of_transformers(name):
    """A family's own number, which in most of them is not that of the query heads."""
    transformers = pytest.importorskip("transformers")
    given = {field: value for field, value in MINIMAL.items() if field != "num_key_value_heads"}
    given |= dict(model_type=name, hidden_size=128, num_attention_heads=64)
    whole = transformers.AutoConfig.for_model(**given).to_dict()
    assert config_from_huggingface(given).num_kv_heads == whole["num_key_value_heads"]
    assert config_from_huggingface(given | dict(num_key_value_heads=None)).num_kv_heads == 64


def test_yarn_temperatures():
    """cos and sin are multiplied by what transformers computes from each combination."""

    def rope(**fields):
        fields |= dict(rope_type="yarn", original_max_position_embeddings=64)
        return config_from_huggingface(MINIMAL | dict(rope_parameters=fields)).rope

    def temperature(mscale):
        return 0.1 * mscale * math.log(4.0) + 1

    assert rope().factor == 4.0  # a missing factor is the ratio of the two lengths
    for fields, expected in (
        ({}, temperature(1)),
        (dict(mscale=0.7), temperature(1)),
        (dict(mscale_all_dim=0.7), temperature(1)),
        (dict(mscale=0.7, mscale_all_dim=0.3), temperature(0.7) / temperature(0.3)),
        (dict(attention_factor=1.7, mscale_all_dim=0.3), 1.7),
    ):
        read = rope(**fields)
        assert magnitude(read) == pytest.approx(expected)
        assert read.mscale_all_dim == fields.get("mscale_all_dim", 0)


def test_latent_geometry():
    config = config_from_huggingface(MINIMAL | LATENT)
    assert config.mla == fkv.MLAConfig(kv_lora_rank=12, nope_dim=8, rope_dim=4, v_dim=6)
    assert config_from_huggingface(MINIMAL | LATENT | dict(q_lora_rank=5)).mla.q_lora_rank == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="gpt2"), "model_type='gpt2'; choose llama, mistral"),
        (LATENT | dict(attention_bias=True), "block.qkv_bias=True; MLA has no such option"),
        (dict(hidden_act="relu"), "hidden_act='relu'"),
        (dict(model_type="gemma", use_bidirectional_attention=True), "use_bidirectional_attention"),
        (dict(model_type="gemma2", layer_types=["full_attention"]), "1 layer_types for 3 layers"),
        (dict(model_type="qwen2", layer_types=["linear_attention"] * 3), "linear_attention"),
        (dict(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
        (dict(num_hidden_layers="3"), "num_hidden_layers='3'"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "sliding_attention"),
        (dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), "rope_type='dynamic'"),
        (dict(rope_scaling=dict(type="longrope", long_factor=[1.0])), "LongRoPE, whose .*4k"),
        (dict(rope_scaling=dict(rope_type="linear")), "no factor"),
        (dict(hidden_size=None), "no hidden_size"),
        (LATENT | dict(first_k_dense_replace=1), "mixtures of experts"),
        (LATENT | dict(rms_norm_eps=1e-5), "rms_norm_eps=1e-05"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5; llama turns all channels"),
        (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor=0.5"),
        (dict(rope_parameters=dict(full_attention={})), "only Gemma 3 has them"),
        (
            dict(model_type="gemma3_text", rope_parameters=dict(rope_theta=7.0)),
            "full_attention and sliding_attention only",
        ),
        (LATENT | dict(rope_scaling=LINEAR | dict(mscale_all_dim=1.3)), "mscale_all_dim with"),
        (dict(rope_theta=None), "no rope_theta"),
        (dict(hidden_act=None), "hidden_act=None"),
        (dict(is_causal=False), "is_causal=False"),
        (dict(transformers_weights="other.safetensors"), "transformers_weights"),
        (dict(model_type="phi3", sliding_window=0), "sliding_window=0; use null"),
        (
            dict(model_type="gemma3_text", rope_scaling=dict(type="linear", factor=2.0)),
            "no rope_type",
        ),
        (dict(model_type="mistral", layer_types=["full_attention"] * 3), "Ministral"),
        (
            dict(model_type="gemma2", sliding_window=None),
            "layer_types with windows, and no sliding_window",
        ),
    ],
)
def test_what_we_cannot_compute_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_from_huggingface(MINIMAL | changes)


def test_export_refuses_what_transformers_cannot_say():
    with pytest.raises(ConfigError, match="layer 2 is not an ordinary one"):
        config_to_huggingface(small_config("fusedkv", num_layers=4))
    for changes in (
        dict(block=BlockConfig(parallel=True)),
        dict(rope=fkv.RopeConfig(fraction=0.5)),
        dict(nope_layers=(1,)),  # with norms of queries and keys
        dict(logit_scale=0.5),
        dict(  # Gemma 3 has no cap
            qk_norm=True,
            embedding_scale=32**0.5,
            block=BlockConfig(
                norm="rms_plus_one",
                norm_placement="both",
                activation="gelu_tanh",
                attention_softcap=2.0,
            ),
        ),
    ):
        with pytest.raises(ConfigError, match="no architecture with these options"):
            config_to_huggingface(small_config("mha", **changes))
    mla = fkv.MLAConfig(kv_lora_rank=8, nope_dim=4, rope_dim=4, v_dim=4)
    with pytest.raises(ConfigError, match="mla is set"):
        config_to_huggingface(small_config("mha", mla=mla))


FAMILIES = {
    "Llama": dict(block=BlockConfig(qkv_bias=True, output_bias=True, mlp_bias=True)),
    "Mistral": dict(layout="0s4_1s4_2s4_3s4_4s4_5s4"),
    "Qwen2": dict(block=BlockConfig(qkv_bias=True), layout="0_1_2_3s4_4s4_5s4"),
    "Qwen3": dict(qk_norm=True, layout="0s4_1_2s4_3_4_5"),
    "SmolLM3": dict(nope_layers=(1, 5)),
    "Granite": dict(
        block=BlockConfig(residual_scale=0.3, attention_scale=0.1), embedding_scale=4.0
    ),
    "Olmo2": dict(qk_norm=True, block=BlockConfig(norm_placement="post", qk_norm_over="all")),
    "Gemma": dict(
        block=BlockConfig(norm="rms_plus_one", activation="gelu_tanh"), embedding_scale=32**0.5
    ),
    "Gemma2": dict(
        embedding_scale=32**0.5,
        logit_softcap=3.0,
        layout="0s4_1_2s4_3_4s4_5",
        block=BlockConfig(
            norm="rms_plus_one",
            norm_placement="both",
            activation="gelu_tanh",
            attention_softcap=2.0,
            attention_scale=20**-0.5,
        ),
    ),
    "Gemma3": dict(
        embedding_scale=32**0.5,
        qk_norm=True,
        layout="0s4_1_2s4_3_4s4_5",
        window_rope=fkv.RopeConfig(theta=7.0),
        block=BlockConfig(
            norm="rms_plus_one",
            norm_placement="both",
            activation="gelu_tanh",
            attention_scale=20**-0.5,
        ),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_found_and_read_back(name):
    changes = {"qk_norm": False, "layout": "mha"} | FAMILIES[name]
    config = small_config(changes.pop("layout"), **changes)
    fields = json.loads(json.dumps(config_to_huggingface(config)))
    assert fields["architectures"] == [f"{name}ForCausalLM"]
    again = config_from_huggingface(fields)
    assert again.layer_ropes == config.layer_ropes
    assert dataclasses.replace(again, layout=config.layout) == config


NEOX = BlockConfig(
    norm="layer", gated=False, activation="gelu", qkv_bias=True, output_bias=True, mlp_bias=True
)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("scaling", ["none", "linear", "yarn"])
def test_transformers_reads_the_same_of_partial_rotation(scaling, fraction):
    transformers = pytest.importorskip("transformers")
    factor = 1.0 if scaling == "none" else 2.0
    rope = fkv.RopeConfig(theta=123.0, scaling=scaling, factor=factor, fraction=fraction)
    config = small_config("mha", num_kv_heads=4, qk_norm=False, rope=rope, block=NEOX)
    fields = json.loads(json.dumps(config_to_huggingface(config)))
    whole = transformers.AutoConfig.for_model(**fields).to_dict()
    assert whole["model_type"] == "gpt_neox"
    assert config_from_huggingface(whole).rope == config_from_huggingface(fields).rope


def test_what_transformers_does_not_load_is_not_exported_so():
    linear = fkv.RopeConfig(scaling="linear", factor=2.0, fraction=0.5)  # Phi-3 has LongRoPE only
    scaled = BlockConfig(
        norm="rms_plus_one", norm_placement="both", activation="gelu_tanh", attention_scale=0.31
    )  # Gemma 2 and 3 take whole numbers for its inverse square
    for qk_norm, changes in (
        (False, dict(rope=linear)),
        (False, dict(embedding_scale=32**0.5, block=scaled)),
        (True, dict(embedding_scale=32**0.5, block=scaled)),
    ):
        with pytest.raises(ConfigError, match="no architecture with these options"):
            config_to_huggingface(small_config("mha", qk_norm=qk_norm, **changes))


def test_configurations_survive_export():
    for scaling in ("none", "linear", "llama3", "yarn"):
        factor = 1.0 if scaling == "none" else 2.0
        rope = fkv.RopeConfig(theta=123.0, scaling=scaling, factor=factor)
        for config in (
            small_config("mha", rope=rope),
            small_config("mha", rope=rope, qk_norm=False),
        ):
            again = config_from_huggingface(json.loads(json.dumps(config_to_huggingface(config))))
            assert dataclasses.asdict(again) == dataclasses.asdict(config)


def test_the_epsilon_of_another_family_is_not_read():
    stray = config_from_huggingface(MINIMAL | {"layer_norm_eps": 0.5})
    assert stray == config_from_huggingface(MINIMAL)
