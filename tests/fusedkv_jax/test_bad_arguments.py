"""Public functions and what cannot be: one line that names the argument and what to use."""

# ruff: noqa: F401 (the calls below are texts)
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusedkv_jax as fkv
import pallas_kernels as pk
from fusedkv_jax import compression as C
from fusedkv_jax import costs, evaluation, interop, layouts, presets, serving, training
from fusedkv_jax import data as D
from fusedkv_jax.data import chat
from fusedkv_jax.serving import simulate
from fusedkv_jax.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("without_type_checks")
CONFIG = fkv.ModelConfig(
    vocab_size=40, num_layers=4, d_model=8, num_heads=2, d_ff=8, max_length=16, layout="fusedkv"
)


@pytest.fixture(scope="module")
def names():
    """What the calls below may name."""
    fields = {
        "vocab_size": 40, "num_layers": 4, "d_model": 8, "num_heads": 2, "d_ff": 8
    }  # fmt: skip
    pages = {
        "num_pages": 4, "page_size": 8, "num_kv_heads": 2, "num_keys": 1, "num_values": 1,
        "key_size": 8, "value_size": 8, "dtype": "float32",
    }  # fmt: skip
    q = jnp.ones((1, 2, 4, 8))
    kv = [jnp.ones((1, 6, 2, 8))]
    return {
        **globals(),
        "inf": float("inf"),
        "nan": float("nan"),
        "config": CONFIG,
        "model": fkv.Decoder(CONFIG, rngs=nnx.Rngs(0)),
        "cache": lambda **k: fkv.KVCache.create(CONFIG, **({"batch_size": 1, "max_length": 8} | k)),
        "built": lambda **k: fkv.ModelConfig(**(fields | k)),
        "experiment": lambda **k: training.ExperimentConfig(
            **({"name": "a", "model": CONFIG, "data": D.DataConfig(seq_len=8, batch_size=2)} | k)
        ),
        "byte": D.tokenizers.load("byte"),
        "template": chat.ChatTemplate("{{ messages[0].content }}"),
        "said": [{"role": "user", "content": "a"}],
        "ids": jnp.ones((1, 3), jnp.int32),
        "three": jnp.array([3], jnp.int32),
        "q": q,
        "kv": kv,
        "attend": lambda *a, **k: pk.attention(*a, **({"implementation": "reference"} | k)),
        "codes": jnp.ones((1, 6, 2, 8), jnp.int8),
        "paged": lambda **k: pk.Pages.create(**(pages | k)),
        "table": jnp.zeros((1, 2), jnp.int32),
        "places": jnp.array([[0, 1]]),
        "two": [jnp.ones((1, 2, 2, 8))],
        "scheduler": lambda: serving.Scheduler(
            serving.PagedMemory(8, 16), serving.POLICIES["fcfs"]()
        ),
    }


NAMED = [
    ("costs.train_flops_per_token(config, 0)", "length=0; use a whole number of at least 1"),
    ("costs.prefill_flops(config, -5)", "length=-5; use a whole"),
    ("costs.decode_flops(config, nan)", "length=nan; use a whole"),
    ("costs.decode_cache_reads(config, 1.5)", "length=1.5; use a whole"),
    ("costs.summary(config, inf)", "length=inf; use a whole"),
    ("costs.cache_bytes(config, True, 8)", "batch_size=True; use a whole"),
    ("costs.parameter_count('4b')", "config is str; pass a ModelConfig"),
    ("costs.StepCosts.of(5)", "config is int; pass a ModelConfig"),
    ("layouts.resolve('cla:k=99999999', 4)", "k=99999999; use 1 to num_layers=4"),
    ("layouts.draw('mha')", "layout is str; pass a KVLayout"),
    ("layouts.runs(None)", "layout is NoneType; pass a KVLayout"),
    ("presets.get(None)", "name=None; use text"),
    ("built(attention='fast')", "attention='fast': .* must be one of auto"),
    ("fkv.Decoder('4b', rngs=nnx.Rngs(0))", "config is str; pass a ModelConfig"),
    ("fkv.Decoder(config, rngs=0)", "rngs is int; pass nnx.Rngs"),
    ("model(ids[0])", r"tokens has shape \(3,\); use \[B, T\]"),
    ("model(ids * 1.0)", "tokens is float32; use an array of int32"),
    ("fkv.fold_fusion(5)", "model is int; pass a Decoder"),
    ("fkv.prefill(None, ids, three, cache())", "model is NoneType; pass a Decoder"),
    ("fkv.prefill(model, ids, three, None)", "cache is a NoneType; use KVCache.create"),
    ("fkv.prefill(model, ids, None, cache())", "lengths is object; use an array of int32"),
    ("fkv.prefill(model, ids * 1.0, three, cache())", "tokens is float32; use an array"),
    ("fkv.prefill(model, ids[:, :0], three * 0, cache())", "tokens has shape .*; use at least one"),
    ("fkv.decode_step(model, [1], cache())", "tokens is list; use an array of int32"),
    ("fkv.decode_step(model, ids, cache())", r"tokens has shape \(1, 3\); use \[B\]"),
    ("fkv.generate(model, [[True]])", "prompt 0 is neither a text nor a list of token ids"),
    ("fkv.generate(model, [np.array([True])])", "prompt 0 is neither"),
    ("fkv.generate(model, [np.ones((2, 2), int)])", r"prompt 0 is an array of shape \(2, 2\)"),
    (
        "fkv.generate(model, [[1]], fkv.SamplingParams(logprobs=41))",
        "prompt 0 has logprobs=41; the vocabulary has 40",
    ),
    ("fkv.SelfSpeculation(draft_tokens=1.5)", "draft_tokens=1.5; use a whole number"),
    ("fkv.SelfSpeculation(adaptive='x')", "adaptive='x'; use True or False"),
    (
        "fkv.generate(model, [[1]], speculation=fkv.SelfSpeculation(draft_tokens=10**9))",
        "draft_tokens=1000000000; use less than the model's max_length=16",
    ),
    ("fkv.warm_up(model, max_length=10**9)", "max_length=1000000000; use 2 to 16"),
    ("fkv.chat(model, said, tokenizer=byte, template='x')", "template is str; pass ChatTemplate"),
    ("fkv.chat(model, said[0], tokenizer=byte, template=template)", "pass a list of messages"),
    ("fkv.chat(model, [said, 5], tokenizer=byte, template=template)", "conversation 1 is 5; pass"),
    ("chat.check_messages([{'role': 'user', 'content': 5}])", "message 0 has content=5; use text"),
    ("chat.load_template('byte')", "the byte tokenizer has no chat template"),
    ("C.H2O(decode_scores='x')", "H2O: decode_scores='x'; use True or False"),
    ("C.StreamingLLM(reindex='no')", "StreamingLLM: reindex='no'; use True or False"),
    ("C.MiniCache(per_head=1)", "MiniCache: per_head=1; use True or False"),
    ("C.DoubleSparsity(channels=5)", "channels=5; use what `calibrate` returns"),
    ("C.DoubleSparsity(channels=((0, 1), (2,)))", "use what `calibrate` returns"),
    ("C.DoubleSparsity(channels=(((0.5,),),))", "use what `calibrate` returns"),
    ("byte.encode(5)", "the text to encode is int; pass text"),
    ("byte.encode_batch(['a', None])", "the text to encode is NoneType; pass text"),
    ("C.parse('h2o:budget=4,budget=5')", "sets budget twice"),
    ("C.parse('h2o:budget=4,')", "write fields as name:field=value"),
    ("C.parse(None)", "compressor=None; use text"),
    ("MeshConfig(context=1.5)", "mesh.context=1.5; use a whole number"),
    ("MeshConfig(data=True)", "mesh.data=True; use a whole number"),
    ("training.OptimizerConfig(warmup_steps=1.5)", "optimizer.warmup_steps=1.5; use a whole"),
    ("training.OptimizerConfig(offload='x')", "optimizer.offload='x'; use True or False"),
    ("training.OptimizerConfig(learning_rate=nan)", "optimizer.learning_rate=nan; use a number"),
    ("training.TrainConfig(peak_flops='a')", "train.peak_flops='a'; use a number above 0 or None"),
    ("training.EarlyExitConfig(rotation=1.5)", "early_exit.rotation=1.5; use a whole number"),
    ("experiment(model=None)", "model=None; use a ModelConfig"),
    ("experiment(name='')", "name='' is empty"),
    ("interop.config_to_huggingface(5)", "config is int; pass a ModelConfig"),
    ("interop.with_layout(5, 'mha')", "config is int; pass a ModelConfig"),
    ("interop.save_huggingface(5, '/nowhere')", "model is int; pass a Decoder"),
    ("attend(None, kv, kv)", "q is NoneType; it must be a float array"),
    ("attend(q, kv, kv, causal='no')", "causal is 'no'; it must be True or False"),
    ("attend(q, kv, kv, return_residuals=1)", "return_residuals is 1; it must be True or False"),
    ("attend(q, kv, kv, kv_lengths=np.array([7]))", "kv_lengths holds 7; it must be from 0 to S"),
    ("attend(q, kv, kv, kv_lengths=np.array([-1]))", "kv_lengths holds -1; it must be from 0"),
    ("attend(q, [pk.Quantized(codes, None)], kv)", r"keys\[0\].scale is no array"),
    ("attend(q, [pk.Quantized(None, None)], kv)", r"keys\[0\].data is no array"),
    ("pk.quantize(None)", "x is NoneType; it must be a float"),
    ("pk.quantize(codes)", "x is int8 of shape .*; it must be a float"),
    ("paged(dtype='int4')", "dtype is int4; it must be a float type or one of int8"),
    ("paged(dtype=bool)", "dtype is <class 'bool'>; it must be a float type"),
    ("paged().write(two, [two[0][..., 1:]], table, places)", r"values\[0\] has shape .* must be"),
    ("paged().write(two, two, table * 1.0, places)", "page_table is float32 of shape"),
    ("paged().write(two, two, table, places[0])", r"positions is int32 of shape \(2,\)"),
    (
        "pk.paged_attention(q, paged(), table, three, scale=nan)",
        "scale is nan; it must be a finite",
    ),
    ("pk.paged_attention(None, paged(), table, three)", "q is NoneType; it must be a float"),
    ("paged(dtype=None)", "dtype is None; it must be a float type"),
    ("paged(page_size=True)", "page_size is True; it must be a whole number"),
    (
        "paged().write(two, two, jnp.zeros((2, 2), int), places)",
        "page_table has 2 rows; positions have 1",
    ),
    ("attend(q, kv, kv, softcap=inf)", "softcap is inf; it must be positive"),
    ("attend(q, kv, kv, window=True)", "window is True; it must be a whole number"),
    ("attend(q, 'ab', kv)", "keys must be a non-empty tuple"),
    ("attend(q, [pk.Stacked(None, 0, 8)], kv)", r"keys\[0\].data is no array"),
    ("attend(q, [pk.Quantized(codes, codes[..., :1])], kv)", r"keys\[0\].scale is int8"),
    ("pk.quantize(q, token_group=2.0)", "token_group is 2.0; it must divide S"),
    ("pk.quantize(q, scale_dtype='int8')", "scale_dtype is int8; it must be a float type"),
    ("pk.combine([(q, None)])", r"parts\[0\], lse, is NoneType; it must be a float array"),
    ("C.prune_sources(5, 1.0, ids)", "model is int; pass a Decoder"),
    ("C.prune_sources(model, 1.0, ids * 1.0)", "calibration is float32; use an array of int32"),
    ("evaluation.at_length(model, ids, chunk=0)", "chunk=0; use a whole number"),
    ("evaluation.at_length(model, ids * 1.0)", "texts is float32; use an array of int32"),
    ("training.ExperimentConfig.from_dict({})", "the experiment has no name; to_dict"),
    (
        "training.ExperimentConfig.from_dict(experiment().to_dict() | {'train': [1]})",
        r"train=\[1\]; use fields by name",
    ),
    ("training.train(None, '/nowhere')", "config is NoneType; pass an ExperimentConfig"),
    ("training.save_model(5, experiment(), '/nowhere')", "model is int; pass a Decoder"),
    ("training.save_model(model, None, '/nowhere')", "config is NoneType; pass an Experiment"),
    ("training.make_optimizer(None, 10)", "config is NoneType; pass an OptimizerConfig"),
    ("training.make_optimizer(training.OptimizerConfig(), 0)", "steps=0; use a whole number"),
    ("training.Checkpoints('/nowhere', keep=0)", "keep=0; use a whole number of at least 1"),
    ("D.load_corpus(5)", "config is int; pass a DataConfig"),
    ("D.make_train_iterator(None)", "config is NoneType; pass a DataConfig"),
    ("make_mesh(None)", "config is NoneType; pass a MeshConfig"),
    ("serving.ServingSettings(add_special_tokens='no')", "add_special_tokens='no'; use True or"),
    ("serving.Request(5, np.arange(3), 1)", "name=5; use text"),
    ("serving.Request('a', np.array([-1]), 1)", "prompt holds -1; token ids are 0 and more"),
    ("serving.Request('a', np.arange(3), 1, tool_calls=(5,))", "a tool call is int; pass ToolCall"),
    ("scheduler().add(5, 0.0)", "request is int; pass a Request"),
    ("simulate.device(None)", "device=None; use text"),
]


@pytest.mark.parametrize(("call", "message"), NAMED)
def test_it_is_named(names, call, message):
    with pytest.raises(ValueError, match=message) as error:
        eval(call, names)
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_are_numbers():
    assert training.OptimizerConfig(learning_rate=np.float64(1e-3)).learning_rate == 1e-3
    assert costs.cache_bytes(CONFIG, np.int64(2), np.int32(8)) == costs.cache_bytes(CONFIG, 2, 8)


def test_a_row_without_tokens_has_no_logits(names):
    model = names["model"]
    cache = fkv.KVCache.create(CONFIG, batch_size=2, max_length=8)
    tokens = jnp.ones((2, 3), jnp.int32)
    logits, cache = fkv.prefill(model, tokens, jnp.array([0, 3]), cache)
    assert np.isnan(logits).all(1).tolist() == [True, False]
    assert not cache.overflowed.any()
    logits, _ = fkv.prefill(model, tokens, jnp.array([2, 2]), cache)
    assert np.isfinite(logits).all()
