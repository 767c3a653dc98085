"""Import and export of Hugging Face checkpoints, with transformers itself as the oracle."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import fusedkv_jax as fkv
from fusedkv_jax.interop import (
    TensorError,
    load_huggingface,
    save_huggingface,
)
from tests.oracles.decoder import random_decoder, small_config

try:
    import torch
    import transformers
except ImportError:
    torch = transformers = None
needs_oracle = pytest.mark.skipif(
    transformers is None, reason="needs torch and transformers: pip install '.[reference]'"
)

TOLERANCE = 1e-4
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 37, (2, 12)), jnp.int32)

COMMON = dict(
    vocab_size=37,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=256,
)
GQA = COMMON | dict(num_key_value_heads=2)
LATENT = COMMON | dict(
    num_key_value_heads=4,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=6,
    first_k_dense_replace=3,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
)
# Short original contexts, so that positions 0 to 11 reach every branch of the scaling.
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=4.0,
    original_max_position_embeddings=32,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=64)
MSCALE = YARN | dict(mscale=0.707, mscale_all_dim=1.3)

# name: (transformers class, arguments of its configuration)
CASES = {
    "llama": ("Llama", GQA | dict(head_dim=10)),
    "llama-tied": ("Llama", GQA | dict(tie_word_embeddings=True, rms_norm_eps=1e-3)),
    "llama-linear": ("Llama", GQA | dict(rope_parameters=dict(rope_type="linear", factor=3.0))),
    "llama-llama3": ("Llama", GQA | dict(rope_parameters=LLAMA3)),
    "llama-yarn": ("Llama", GQA | dict(rope_parameters=YARN)),
    "llama-yarn-factor": ("Llama", GQA | dict(rope_parameters=YARN | dict(attention_factor=1.7))),
    "qwen3": ("Qwen3", GQA | dict(head_dim=16)),
    "deepseek3": ("DeepseekV3", LATENT | dict(q_lora_rank=None)),
    "deepseek3-lora-yarn": ("DeepseekV3", LATENT | dict(q_lora_rank=16, rope_parameters=MSCALE)),
    "deepseek3-halves": ("DeepseekV3", LATENT | dict(q_lora_rank=16, rope_interleave=False)),
    "deepseek2-yarn": ("DeepseekV2", LATENT | dict(q_lora_rank=16, rope_parameters=MSCALE)),
}

# Families with options of their own; windows are shorter than the prompt and the text.
WINDOW = dict(sliding_window=5)
SCALES = dict(
    embedding_multiplier=3.0,
    logits_scaling=2.0,
    residual_multiplier=0.4,
    attention_multiplier=0.2,
)
GEMMA = GQA | dict(head_dim=8)
FOUR = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
CASES |= {
    "llama-biases": ("Llama", GQA | dict(attention_bias=True, mlp_bias=True)),
    "mistral-window": ("Mistral", GQA | WINDOW),
    "qwen2": ("Qwen2", GQA | WINDOW | dict(use_sliding_window=True, max_window_layers=1)),
    "smollm3": ("SmolLM3", GQA | dict(no_rope_layers=[1, 0, 1], pad_token_id=0)),
    "granite": ("Granite", GQA | SCALES),
    "olmo2": ("Olmo2", GQA),
    "phi3": ("Phi3", GQA | WINDOW | dict(pad_token_id=0)),
    "gemma": ("Gemma", GEMMA),
    "gemma2": (
        "Gemma2",
        GEMMA
        | WINDOW
        | dict(num_hidden_layers=4, layer_types=FOUR, query_pre_attn_scalar=20)
        | dict(attn_logit_softcapping=1.5, final_logit_softcapping=3.0),
    ),
    "gemma3": (
        "Gemma3Text",
        GEMMA
        | WINDOW
        | dict(num_hidden_layers=4, layer_types=FOUR, query_pre_attn_scalar=20)
        | dict(attn_logit_softcapping=1.5),  # which it does not compute
    ),
    "gpt-neox": (
        "GPTNeoX",
        COMMON | dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)),
    ),
    "gpt-neox-in-turn": (
        "GPTNeoX",
        COMMON | dict(use_parallel_residual=False, hidden_act="gelu_new"),
    ),
}

GEMMA_BLOCK = fkv.config.BlockConfig(
    norm="rms_plus_one",
    norm_placement="both",
    activation="gelu_tanh",
    attention_scale=20**-0.5,
)

# One of each, for what takes longer.
FAMILIES = (
    "llama",
    "mistral-window",
    "qwen2",
    "qwen3",
    "smollm3",
    "granite",
    "olmo2",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt-neox",
    "deepseek2-yarn",
    "deepseek3",
)

# They differ from others in what decoding has from the forward pass: weights, scales, a base.
FORWARD_ONLY = {
    "llama-tied",
    "llama-linear",
    "llama-yarn-factor",
    "llama-biases",
    "deepseek3-halves",
    "granite",
    "olmo2",
    "gemma",
    "gpt-neox-in-turn",
}


def oracle(name, seed=0):
    """A transformers model with weights large enough for every part to matter."""
    family, arguments = CASES[name]
    config = getattr(transformers, f"{family}Config")(**arguments)
    # By default Gemma 2 is computed without soft caps.
    config._attn_implementation = "eager"
    family = family.removesuffix("Text")
    return drawn(getattr(transformers, f"{family}ForCausalLM")(config).eval(), seed)


def drawn(model, seed=0):
    """The model with every array drawn."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                norm = "norm" in path and "bias" not in path and "Gemma" not in type(model).__name__
                parameter.copy_(norm + 0.3 * draw)
            else:
                fan_in = 1 if "embed" in path else parameter.shape[-1]
                parameter.copy_(draw * fan_in**-0.5)
    return model


def oracle_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()


def stepwise_logits(model, tokens, prompt):
    """Logits after the prompt and after each further token, [B, T - prompt + 1, V]."""
    rows, length = tokens.shape
    cache = fkv.KVCache.create(model.config, batch_size=rows, max_length=length)
    logits, cache = fkv.prefill(model, tokens[:, :prompt], jnp.full(rows, prompt), cache)
    collected = [logits]
    for t in range(prompt, length):
        logits, cache = fkv.decode_step(model, tokens[:, t], cache)
        collected.append(logits)
    return np.stack([np.asarray(x) for x in collected], axis=1)


@needs_oracle
@pytest.mark.parametrize("name", CASES)
def test_logits_of_transformers(name, tmp_path):
    original = oracle(name)
    original.save_pretrained(tmp_path)
    expected = oracle_logits(original, TOKENS)
    assert expected.std() > 0.5

    model = load_huggingface(tmp_path)

    np.testing.assert_allclose(model(TOKENS), expected, rtol=0, atol=TOLERANCE)
    if name not in FORWARD_ONLY:
        steps = stepwise_logits(model, TOKENS, prompt=7)
        np.testing.assert_allclose(steps, expected[:, 6:], rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@needs_oracle
@pytest.mark.parametrize("name", FAMILIES)
def test_the_greedy_text_of_transformers(name, tmp_path):
    """Many windows long, each side by its own cache; for the penalty, few tokens come twice."""
    original = oracle(name)
    original.save_pretrained(tmp_path)
    original.generation_config.eos_token_id = None
    prompt = TOKENS[0, :7].tolist()
    options = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=30,
        repetition_penalty=10.0,
        pad_token_id=0,
    )
    with torch.no_grad():
        expected = original.generate(torch.tensor([prompt]), generation_config=options)
    params = fkv.SamplingParams(temperature=0, max_tokens=30, repetition_penalty=10.0)
    (completion,) = fkv.generate(load_huggingface(tmp_path), [prompt], params)
    found = list(completion.outputs[0].token_ids)
    assert found == expected[0, 7:].tolist() and len(set(found)) > 20


@needs_oracle
def test_a_head_that_differs_from_the_tied_embedding(tmp_path):
    """transformers then leaves the head untied; so do we, and say so."""
    original = oracle("llama-tied")
    original.save_pretrained(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    generator = np.random.default_rng(1)
    head = generator.normal(size=tensors["model.embed_tokens.weight"].shape).astype(np.float32)
    tensors["lm_head.weight"] = head
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with pytest.warns(UserWarning, match="lm_head.weight differs from model.embed_tokens.weight"):
        model = load_huggingface(tmp_path)
    assert not model.config.tie_embeddings
    expected = oracle_logits(theirs, TOKENS)
    assert np.abs(expected - oracle_logits(original, TOKENS)).max() > 1
    np.testing.assert_allclose(model(TOKENS), expected, rtol=0, atol=TOLERANCE)


@needs_oracle
@pytest.mark.parametrize(
    "changes",
    [
        dict(qk_norm=False, num_kv_heads=4, tie_embeddings=True),
        dict(
            qk_norm=False,
            num_kv_heads=1,
            rope=fkv.RopeConfig(scaling="yarn", factor=3.0, original_length=64, mscale=0.5),
        ),
        dict(qk_norm=True, num_kv_heads=2, head_dim=12),
        dict(
            qk_norm=True,
            num_kv_heads=2,
            norm_eps=1e-3,
            rope=fkv.RopeConfig(theta=500.0, scaling="llama3", factor=8.0, original_length=32),
        ),
        dict(
            qk_norm=False,
            embedding_scale=32**0.5,
            logit_softcap=3.0,
            block=dataclasses.replace(GEMMA_BLOCK, attention_softcap=2.0),
        ),
        dict(qk_norm=True, embedding_scale=32**0.5, block=GEMMA_BLOCK),
    ],
    ids=[
        "llama-mha-tied",
        "llama-mqa-yarn",
        "qwen3-gqa",
        "qwen3-llama3",
        "gemma2-without-windows",
        "gemma3-without-windows",
    ],
)
def test_transformers_reads_an_export(changes, tmp_path):
    model = drawn_decoder(**changes)
    save_huggingface(model, tmp_path / "exported")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", attn_implementation="eager"
    ).eval()
    expected = np.asarray(model(TOKENS))
    assert expected.std() > 0.5
    np.testing.assert_allclose(oracle_logits(loaded, TOKENS), expected, rtol=0, atol=TOLERANCE)


def drawn_decoder(num_layers=3, **changes):
    """A decoder whose every array, norms included, is drawn."""
    return random_decoder(small_config("mha", num_layers=num_layers, **changes))


def assert_equal_parameters(one, other):
    one, other = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (one, other))
    assert one.keys() == other.keys()
    for path, value in one.items():
        assert value[...].dtype == other[path][...].dtype
        np.testing.assert_array_equal(
            np.asarray(value[...], np.float32), np.asarray(other[path][...], np.float32), str(path)
        )


@pytest.mark.parametrize(
    "changes",
    [
        dict(param_dtype="bfloat16", dtype="bfloat16", head_dim=6),
        dict(qk_norm=False, tie_embeddings=True, rope=fkv.RopeConfig(theta=7.0)),
        dict(rope=fkv.RopeConfig(scaling="yarn", factor=4.0, beta_fast=16.0)),
        dict(rope=fkv.RopeConfig(scaling="linear", factor=2.5, original_length=8192)),
    ],
)
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 3000])
def test_round_trip(changes, max_shard_bytes, tmp_path):
    model = drawn_decoder(**changes)
    save_huggingface(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    loaded = load_huggingface(tmp_path / "m")
    assert loaded.config == model.config
    assert_equal_parameters(loaded, model)
    shards = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert (shards == ["model.safetensors"]) == (max_shard_bytes > 3000)
    for shard in shards[: len(shards) * (max_shard_bytes == 3000)]:
        arrays = safetensors.numpy.load_file(tmp_path / "m" / shard)
        assert len(arrays) == 1 or sum(a.nbytes for a in arrays.values()) <= 3000


def numpy_tensors(model, tmp_path):
    save_huggingface(model, tmp_path / "for_tensors")
    return safetensors.numpy.load_file(tmp_path / "for_tensors" / "model.safetensors")


def test_interleaved_pairs_are_moved_to_halves(tmp_path):
    model = drawn_decoder(num_layers=1)
    tensors = numpy_tensors(model, tmp_path)
    half = 4  # channel c of ours comes from 2c, channel c + half from 2c + 1
    place = np.concatenate([[c, c + half] for c in range(half)])
    prefix = "model.layers.0.self_attn"
    for name, heads in (("q_proj", 4), ("k_proj", 2)):
        weight = tensors[f"{prefix}.{name}.weight"].reshape(heads, 8, 32)
        tensors[f"{prefix}.{name}.weight"] = weight[:, place].reshape(-1, 32)
    for name in ("q_norm", "k_norm"):
        tensors[f"{prefix}.{name}.weight"] = tensors[f"{prefix}.{name}.weight"][place]
    assert_equal_parameters(
        load_huggingface(tensors, config=model.config, rope_interleave=True), model
    )


def test_another_layout_takes_the_parts_it_has_a_place_for(tmp_path):
    model = drawn_decoder(num_layers=4)
    tensors = numpy_tensors(model, tmp_path)
    fused = load_huggingface(tensors, config=model.config, layout="fusedkv", seed=3)
    fresh = fkv.Decoder(model.config.replace(layout="fusedkv"), rngs=nnx.Rngs(3))
    for ours, new in zip(fused.mixing.weights, fresh.mixing.weights, strict=True):
        np.testing.assert_allclose(ours[...], new[...], rtol=1e-6)
    for r, layers in enumerate(([0, 1], [2, 3])):
        block = fused.runs[r][0]
        queries = np.stack([tensors[f"model.layers.{i}.self_attn.q_proj.weight"] for i in layers])
        np.testing.assert_array_equal(
            block.attention.q_proj[...], queries.transpose(0, 2, 1).reshape(2, 32, 4, 8)
        )
    assert fused.runs[1][0].attention.k_proj is None
    # YOCO's norm of the shared cache begins as the layer's input norm.
    yoco = load_huggingface(tensors, config=model.config, layout="yoco:own_norm=true")
    np.testing.assert_array_equal(
        yoco.runs[1][0].kv_norm.scale[0], tensors["model.layers.2.input_layernorm.weight"]
    )


def test_wrong_tensors_are_named(tmp_path):
    model = drawn_decoder()
    good, config = numpy_tensors(model, tmp_path), model.config
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(TensorError, match=f"missing tensors: {name};"):
        load_huggingface({k: v for k, v in good.items() if k != name}, config=config)
    with pytest.raises(TensorError, match=r"unknown tensors: model.layers.0.self_attn.q_proj.bias"):
        load_huggingface(
            good | {"model.layers.0.self_attn.q_proj.bias": np.zeros(32)}, config=config
        )
    with pytest.raises(TensorError, match=rf"{name} has shape \(32, 16\).* \(16, 32\)"):
        load_huggingface(good | {name: good[name].T}, config=config)
    with pytest.raises(TensorError, match=f"{name} is int8"):
        load_huggingface(good | {name: good[name].astype(np.int8)}, config=config)
    with pytest.raises(ValueError, match="config is None"):
        load_huggingface(good)
    # A tied checkpoint may hold the copy; old ones hold frequencies.
    tied = {"lm_head.weight": good["model.embed_tokens.weight"]}
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    load_huggingface(good | tied | extra, config=config.replace(tie_embeddings=True))
