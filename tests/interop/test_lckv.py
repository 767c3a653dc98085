"""`lckv-llama` checkpoints, LCKV's and those of YOCO++, against an oracle in PyTorch."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from fusedkv_jax.config import ConfigError
from fusedkv_jax.interop import config_from_huggingface, load_huggingface
from fusedkv_jax.layouts import LayoutError

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
from tests.oracles import lckv  # noqa: E402

FIELDS = dict(
    model_type="lckv-llama",
    vocab_size=37,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    sliding_window=4,
    tie_word_embeddings=False,
)
UPPER = dict(layer_types="0_1_2_2_2_2", scaling_factor=35.0)
CASES = {
    "lckv": dict(layer_types="0_4_4_4_4_5"),
    "windows": dict(layer_types="0_1s_1s_3_3_3s"),
    "yoco": UPPER | dict(method="yoco"),
    "yoco-plus": UPPER | dict(method="yoco-plus"),
    "fusedkv": UPPER | dict(method="fusedkv"),
    "fusedkv-lite": UPPER | dict(method="fusedkv-lite"),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_oracles(name, tmp_path):
    fields = FIELDS | CASES[name] | dict(forward_passes=11, backward_passes=1)
    tensors = lckv.draw(fields)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    model = load_huggingface(tmp_path)
    tokens = np.random.default_rng(2).integers(0, 37, 12)
    expected = lckv.logits(fields, tensors, tokens)
    found = model(jnp.asarray(tokens[None], jnp.int32))[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_layout_is_that_of_the_file():
    layout = config_from_huggingface(FIELDS | CASES["lckv"]).kv_layout
    assert (layout.cached_keys, layout.is_cyclic, layout.passes) == ((0, 4, 5), True, (7, 2))
    layout = config_from_huggingface(FIELDS | CASES["fusedkv"]).kv_layout
    assert layout.layers[4].value.sources == (0, 2)
    assert layout.layers[4].value.weights == "shared_channel"
    assert config_from_huggingface(FIELDS | CASES["windows"]).kv_layout.layers[1].window == 4


def test_what_is_not_computed_is_refused():
    for change, message in (
        (dict(force_nodiag=True), "force_nodiag"),
        (dict(method="other"), "method='other'; choose yoco"),
        (dict(layer_types="0_1"), "2 layer_types for 6 layers"),
        (dict(layer_types="0x9999"), "layer_types must be numbers"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_from_huggingface(FIELDS | UPPER | change)
    with pytest.raises(LayoutError, match="9"):
        config_from_huggingface(FIELDS | dict(layer_types="0_9_1_1_1_1"))
