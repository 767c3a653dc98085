"""Options of layers that families of models need: refusals, counts of parameters, other layouts."""

import jax
import numpy as np
import pytest
from flax import nnx

import fusedkv_jax as fkv
from fusedkv_jax import costs
from fusedkv_jax.compression import CompressionError, parse
from fusedkv_jax.config import BlockConfig, ConfigError
from fusedkv_jax.interop import with_layout
from tests.oracles.decoder import small_config

EVERYTHING = {
    "neox": dict(
        qk_norm=False,
        rope=fkv.RopeConfig(fraction=0.5),
        block=BlockConfig(
            norm="layer",
            parallel=True,
            gated=False,
            activation="gelu",
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
        ),
    ),
    "gemma": dict(
        layout="0s4_1_2s4_3_4s4_5",
        window_rope=fkv.RopeConfig(theta=7.0),
        logit_softcap=3.0,
        embedding_scale=5.0,
        block=BlockConfig(
            norm="rms_plus_one", norm_placement="both", attention_scale=0.2, attention_softcap=2.0
        ),
    ),
    "olmo": dict(
        nope_layers=(1, 4),
        logit_scale=0.5,
        block=BlockConfig(norm_placement="post", qk_norm_over="all", residual_scale=0.3),
    ),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_parameters_are_counted_and_configurations_survive(name):
    changes = {"layout": "mha"} | EVERYTHING[name]
    config = small_config(changes.pop("layout"), **changes)
    model = nnx.eval_shape(lambda: fkv.Decoder(config, rngs=nnx.Rngs(0)))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == costs.parameter_count(config)
    assert fkv.ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(nope_layers=(6,)), "nope_layers has 6; the layers are 0 to 5"),
        (dict(layout="cla", nope_layers=(1,)), "layer 1 reads the keys of layer 0, which rotate"),
        (
            dict(layout="fusedkv", rope=fkv.RopeConfig(fraction=0.5)),
            "weights key channels in rotary",
        ),
        (dict(rope=fkv.RopeConfig(fraction=0.1)), "odd number of channels"),
        (
            dict(
                mla=fkv.MLAConfig(kv_lora_rank=8, nope_dim=4, rope_dim=4, v_dim=4), nope_layers=(1,)
            ),
            "MLA",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        small_config(changes.pop("layout", "mha"), **changes)
    with pytest.raises(ConfigError, match="norm_placement='post' with parallel"):
        BlockConfig(parallel=True, norm_placement="post")


def test_another_layout_keeps_the_windows():
    config = small_config("0s4_1_2s4_3_4s4_5")
    cla = with_layout(config, "cla")
    assert [layer.window for layer in cla.kv_layout.layers] == [4, None, 4, None, 4, None]
    assert cla.kv_layout.layers[1].key.sources == (0,)
    assert with_layout(small_config("mha"), "cla").kv_layout.spec


def test_one_rotation_cannot_move_queries_of_several_kinds():
    config = small_config("svformer", nope_layers=(1,))
    with pytest.raises(CompressionError, match="use reindex=False"):
        parse("streaming_llm:budget=8").check(config)
    parse("streaming_llm:budget=8,reindex=false").check(config)
    parse("streaming_llm:budget=8").check(small_config("mha", nope_layers=(1,)))
