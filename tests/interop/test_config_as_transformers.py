"""config.json as people write it, by hand or long ago: logits are those of transformers."""

import json

import numpy as np
import pytest

from fusedkv_jax.interop import load_huggingface
from tests.interop.test_huggingface import COMMON, GQA, LATENT, TOKENS, drawn, oracle_logits

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GEMMA = GQA | dict(head_dim=8)
LINEAR = dict(rope_type="linear", factor=5.0)
KINDS = dict(full_attention=LINEAR, sliding_attention=dict(rope_type="default"))

CASES = {
    # Only Gemma 2 and 3 read hidden_activation, and only it; "gelu" is the exact one there.
    "llama-activation": ("llama", GQA | dict(hidden_activation="gelu")),
    "gemma-activation": ("gemma", GEMMA | dict(hidden_act="silu", hidden_activation="gelu")),
    "gemma2-activation": ("gemma2", GEMMA | dict(hidden_act="silu", hidden_activation="gelu")),
    "gemma-softcap": ("gemma", GEMMA | dict(final_logit_softcapping=1.5)),
    "gemma2-pattern": ("gemma2", GEMMA | dict(sliding_window=4, sliding_window_pattern=3)),
    "gemma2-local": ("gemma2", GEMMA | dict(rope_local_base_freq=7.0)),
    "qwen3-bias": ("qwen3", GEMMA | dict(mlp_bias=True)),
    # rope_scaling goes before rope_parameters; of Gemma 3 it is that of full attention.
    "llama-ropes": (
        "llama",
        GQA | dict(rope_scaling=LINEAR, rope_parameters=dict(rope_type="default", rope_theta=7.0)),
    ),
    "gemma3-ropes": (
        "gemma3_text",
        GEMMA
        | dict(sliding_window_pattern=2, rope_scaling=LINEAR)
        | dict(rope_parameters={kind: dict(rope_theta=7.0) for kind in KINDS}),
    ),
    "gemma3-bases": ("gemma3_text", GEMMA | dict(sliding_window_pattern=2, rope_parameters=KINDS)),
    "gemma3-local": (
        "gemma3_text",
        GEMMA
        | dict(sliding_window_pattern=2, rope_parameters=KINDS)
        | dict(rope_theta=50.0, rope_local_base_freq=7.0),
    ),
    "neox-share": ("gpt_neox", COMMON | dict(rotary_pct=0.5, partial_rotary_factor=1.0)),
    "llama-share": ("llama", GQA | dict(rotary_pct=0.5)),
    # DeepSeek-V2 always has pairs side by side, V3 unless it is told otherwise.
    "deepseek2-pairs": ("deepseek_v2", LATENT | dict(q_lora_rank=None, rope_interleave=False)),
    "deepseek3-pairs": ("deepseek_v3", LATENT | dict(q_lora_rank=None, rope_interleave=None)),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_of_a_configuration_that_is_read_as_it_is_written(name, tmp_path):
    model_type, fields = CASES[name]
    written = json.dumps(fields | {"model_type": model_type})
    (tmp_path / "config.json").write_text(written)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    original = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    drawn(original.eval()).save_pretrained(tmp_path)
    expected = oracle_logits(original, TOKENS)
    assert expected.std() > 0.5
    np.testing.assert_allclose(load_huggingface(tmp_path)(TOKENS), expected, rtol=0, atol=1e-4)
    (tmp_path / "config.json").write_text(written)
    np.testing.assert_allclose(load_huggingface(tmp_path)(TOKENS), expected, rtol=0, atol=1e-4)
