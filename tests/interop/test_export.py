"""Export of every layout: PyTorch computes the same, and what is read again is the same."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax.config import BlockConfig, MLAConfig, RopeConfig
from fusedkv_jax.data import tokenizers
from fusedkv_jax.interop import load_huggingface, save_huggingface
from tests.data.test_tokenizers import train_bpe
from tests.interop.test_huggingface import COMMON, GQA, assert_equal_parameters, oracle_logits
from tests.oracles.decoder import random_decoder, small_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
load_tensors = pytest.importorskip("safetensors.torch").load_file

TOKENS = np.random.default_rng(0).integers(0, 37, (2, 12))
LATENT = MLAConfig(kv_lora_rank=12, nope_dim=8, rope_dim=4, v_dim=6, q_lora_rank=10)
YARN = RopeConfig(scaling="yarn", factor=4.0, original_length=64, mscale_all_dim=0.7)

# name: (layout, other options). Windows are shorter than the sequence.
CASES = {
    "fusedkv": ("fusedkv", {}),
    "fusedkv-iterative": ("fusedkv:parameterization=iterative,granularity=head", {}),
    "fusedkv-mla": ("fusedkv:parameterization=normal", dict(mla=LATENT, rope=YARN)),
    "fusedkv_lite": ("fusedkv_lite", dict(tie_embeddings=True, qk_norm=False)),
    "dense_fusion": ("dense_fusion", dict(block=BlockConfig(qkv_bias=True, output_bias=True))),
    "cla": ("cla:k=3", dict(embedding_scale=3.0, logit_scale=0.5, logit_softcap=4.0)),
    "yoco": ("yoco:window=5", {}),
    "yoco_pp": ("yoco_pp", dict(rope=dataclasses.replace(YARN, mscale_all_dim=0.0))),
    "lckv": ("lckv:w=2", {}),
    "svformer": (
        "svformer",
        dict(
            block=BlockConfig(
                norm="layer", parallel=True, gated=False, mlp_bias=True, activation="gelu"
            ),
            rope=RopeConfig(fraction=0.5),
        ),
    ),
    "resformer": (
        "resformer",
        dict(block=BlockConfig(norm_placement="post", qk_norm_over="all", residual_scale=0.4)),
    ),
    "window_hybrid": (
        "window_hybrid:window=5,full_every=2,split=4",
        dict(
            block=BlockConfig(
                norm="rms_plus_one",
                norm_placement="both",
                activation="gelu_tanh",
                attention_scale=0.3,
                attention_softcap=2.0,
            ),
            window_rope=RopeConfig(theta=100.0),
        ),
    ),
}


@pytest.fixture(scope="module")
def modeling():
    """The PyTorch file, from the package."""
    from fusedkv_jax.interop.pytorch import modeling_fusedkv

    return modeling_fusedkv


@pytest.mark.parametrize("name", CASES)
def test_pytorch_computes_every_layout(name, modeling, tmp_path):
    layout, changes = CASES[name]
    model = random_decoder(small_config(layout, **changes))
    save_huggingface(model, tmp_path / "m")
    theirs = modeling.FusedKVForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        found = theirs(torch.tensor(TOKENS)).logits.numpy()
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.tensor(TOKENS)], dim=1)
        mask = torch.ones_like(padded)
        mask[:, :3] = 0
        shifted = theirs(padded, attention_mask=mask).logits[:, 3:].numpy()
    expected = np.asarray(model(jnp.asarray(TOKENS, jnp.int32)))
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(shifted, expected, rtol=0, atol=1e-4)

    again = load_huggingface(tmp_path / "m")
    assert again.config == model.config
    assert_equal_parameters(again, model)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_stream_weights_are_never_rounded(dtype, modeling, tmp_path):
    model = random_decoder(small_config("fusedkv", param_dtype="bfloat16", dtype="bfloat16"))
    save_huggingface(model, tmp_path / "m")
    theirs = modeling.FusedKVForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype).state_dict()
    stored = load_tensors(tmp_path / "m" / "model.safetensors")
    for name, weights in stored.items():
        learned = name.endswith(("key_weights", "value_weights"))
        assert weights.dtype == (torch.float32 if learned else torch.bfloat16)
        assert theirs[name].dtype == (torch.float32 if learned else dtype or torch.bfloat16)
        assert not learned or torch.equal(theirs[name], weights)


HALF = dict(rope_parameters=dict(rope_type="default", rope_theta=50.0, partial_rotary_factor=0.5))


@pytest.mark.parametrize(
    "family, arguments",
    [
        ("Phi3", GQA | HALF | dict(sliding_window=5, pad_token_id=None)),
        ("GPTNeoX", COMMON | HALF | dict(layer_norm_eps=1e-3)),
    ],
)
def test_families_that_join_tensors_come_out_as_they_went_in(family, arguments, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**arguments)
    original = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    original.save_pretrained(tmp_path / "theirs")
    save_huggingface(load_huggingface(tmp_path / "theirs"), tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(original)
    old, new = original.state_dict(), again.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    expected = oracle_logits(original, TOKENS)
    np.testing.assert_allclose(oracle_logits(again, TOKENS), expected, rtol=0, atol=1e-6)


def test_another_layout_of_an_export_takes_what_it_has_a_place_for(tmp_path):
    model = random_decoder(small_config("fusedkv", num_layers=4))
    save_huggingface(model, tmp_path / "m", facts={"held-out loss": "1.5 | nats"})
    lite = load_huggingface(tmp_path / "m", layout="fusedkv_lite")
    assert lite.config.kv_layout.spec == "fusedkv_lite"
    np.testing.assert_array_equal(lite.embedding[...], model.embedding[...])
    queries = [m.runs[1][0].attention.q_proj[...] for m in (lite, model)]
    np.testing.assert_array_equal(*queries)
    card = (tmp_path / "m" / "README.md").read_text()
    assert fkv.layouts.draw(model.config.layout) in card and r"1.5 \| nats" in card
    assert "(50% of 256)" in card  # 4 layers of 2 x 16 channels, 2 bytes each


@pytest.mark.parametrize("layout", ["mha", "fusedkv"])  # of the family qwen3, and our own
@pytest.mark.parametrize("entries", [None, {"eos_token": "</s>", "unk_token": "<pad>"}])
def test_transformers_cuts_texts_by_the_tokenizer_that_is_copied(layout, entries, tmp_path):
    ours = tokenizers.load(str(train_bpe(tmp_path / "tokenizer.json")))
    if entries is not None:  # no class, by which transformers would take the family's
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(entries))
    model = random_decoder(small_config(layout, vocab_size=ours.vocab_size))
    save_huggingface(model, tmp_path / "m", tokenizer=tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m", trust_remote_code=False)
    text = "def f(x):\n    return 1\n\n\n  y"
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert len(theirs) == ours.vocab_size


def test_a_model_of_bytes_says_which_tokens_begin_and_end_texts(tmp_path):
    model = random_decoder(small_config("mha", vocab_size=258, qk_norm=False))
    save_huggingface(model, tmp_path / "m", tokenizer="byte")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").generation_config
    assert (theirs.bos_token_id, theirs.eos_token_id) == (256, 257)  # by Llama's defaults 1 and 2


def test_the_folder_s_own_code_is_not_what_is_run(tmp_path):
    model = random_decoder(small_config("cla", num_layers=2))
    save_huggingface(model, tmp_path / "m")
    (tmp_path / "m" / "modeling_fusedkv.py").write_text("raise SystemExit('it was run')")
    assert load_huggingface(tmp_path / "m").config == model.config
