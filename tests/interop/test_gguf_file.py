"""GGUF files: what is read is what was written; damaged and lying files are one line."""

import struct

import jax.numpy as jnp
import numpy as np
import pytest

from fusedkv_jax.config import ConfigError, RopeConfig
from fusedkv_jax.interop import (
    GgufError,
    TensorError,
    gguf_config,
    load_gguf,
    load_huggingface,
)
from fusedkv_jax.interop.gguf_file import GgufFile

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

WIDTH, LAYERS, VOCABULARY = 32, 2, 37
METADATA = {
    "block_count": LAYERS,
    "context_length": 128,
    "embedding_length": WIDTH,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 8,
    "vocab_size": VOCABULARY,
}
SHAPES = {
    "token_embd": (VOCABULARY, WIDTH),
    "output_norm": (WIDTH,),
    "attn_norm": (WIDTH,),
    "ffn_norm": (WIDTH,),
    "attn_q": (32, WIDTH),
    "attn_k": (16, WIDTH),
    "attn_v": (16, WIDTH),
    "attn_output": (WIDTH, 32),
    "ffn_gate": (64, WIDTH),
    "ffn_up": (64, WIDTH),
    "ffn_down": (WIDTH, 64),
}
HUGGINGFACE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def tensors():
    """Values by llama.cpp's names, large enough for every part to matter."""
    rng = np.random.default_rng(0)
    found = {}
    for part, shape in SHAPES.items():
        whole = part in ("token_embd", "output_norm")
        for name in [part] if whole else [f"blk.{i}.{part}" for i in range(LAYERS)]:
            values = rng.normal(size=shape)
            values = 1 + 0.3 * values if len(shape) == 1 else values / shape[-1] ** 0.5
            found[f"{name}.weight"] = values.astype(np.float32)
    return found


def write(path, values, raw_dtype=None, architecture="llama", **metadata):
    """A GGUF file by the package's own writer."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (METADATA | metadata).items():
        kinds = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        kinds[type(value)](f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 100.0)
    for name, value in values.items():
        writer.add_tensor(name, value, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def huggingface_names(values):
    """The same by transformers' names, rotary pairs still interleaved."""
    named = {}
    for name, value in values.items():
        parts = name.removesuffix(".weight").split(".")
        prefix = f"model.layers.{parts[1]}." if len(parts) == 3 else ""
        named[f"{prefix}{HUGGINGFACE[parts[-1]]}.weight"] = value
    return named


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "good.gguf", tensors())


@pytest.mark.parametrize("kind", gguf.GGMLQuantizationType, ids=lambda kind: kind.name)
def test_values_of_every_quantization(kind, tmp_path):
    """Random blocks, which any bytes are."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (3, 512 // block * size), dtype=np.uint8)
    raw = raw.view({"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8))
    path = write(tmp_path / "m.gguf", {"t": raw}, raw_dtype=kind)
    (tensor,) = gguf.GGUFReader(path).tensors
    with GgufFile(path) as file, np.errstate(all="ignore"):  # scales, too, are any bytes
        assert (list(file), file.metadata["llama.block_count"]) == (["t"], LAYERS)
        try:
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            with pytest.raises(GgufError, match=f"tensor t is {kind.name}"):
                file["t"]
        else:
            assert expected.shape == (3, 512)
            np.testing.assert_array_equal(file["t"], expected.astype(np.float32))


def test_a_model_is_that_of_its_tensors(good):
    model = load_gguf(good)
    config = model.config
    assert (config.norm_eps, config.rope.theta, config.tie_embeddings) == (1e-5, 100.0, True)
    expected = load_huggingface(huggingface_names(tensors()), config=config, rope_interleave=True)
    tokens = jnp.arange(12)[None]
    logits = np.asarray(model(tokens))
    assert logits.std() > 0.5
    np.testing.assert_array_equal(logits, expected(tokens))
    halves = load_huggingface(huggingface_names(tensors()), config=config)
    assert np.abs(np.asarray(halves(tokens)) - logits).max() > 0.1
    assert load_gguf(good, "cla", dtype="bfloat16").config.param_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("metadata", "factor"),
    [
        ({"rope.scaling.factor": 2.5}, 2.5),  # llama.cpp takes linear where there is no type
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}, 2.5),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 2.5}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.factor": 0.0, "rope.scale_linear": 3.0}, None),
        ({"rope.scale_linear": 3.0}, 3.0),
        ({}, None),
    ],
)
def test_scaling_of_the_rope_as_in_llama_cpp(metadata, factor, tmp_path):
    rope = gguf_config(write(tmp_path / "m.gguf", {}, **metadata)).rope
    expected = dict(scaling="linear", factor=factor) if factor else {}
    assert rope == RopeConfig(theta=100.0, **expected)


def test_ropes_that_are_not_computed_are_refused(tmp_path):
    freqs = {"rope_freqs.weight": np.ones(4, np.float32)}
    for values, metadata, message in (
        (freqs, {"rope.scaling.factor": 2.0}, r"rope.scaling.factor=2.0 with rope_freqs.weight"),
        ({}, {"rope.scaling.attn_factor": 1.5}, "attn_factor"),
        ({}, {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "'yarn' is not supported"),
    ):
        with pytest.raises(ConfigError, match=message):
            gguf_config(write(tmp_path / "m.gguf", values, **metadata))


def test_what_is_not_supported_is_named(tmp_path, good):
    values = tensors()
    with pytest.raises(ConfigError, match=r"general.architecture='mamba'; choose llama"):
        load_gguf(write(tmp_path / "a.gguf", values, architecture="mamba"))
    with pytest.raises(ConfigError, match=r"rope.dimension_count is not 8"):
        load_gguf(write(tmp_path / "b.gguf", values, **{"rope.dimension_count": 4}))
    with pytest.raises(TensorError, match=r"unknown tensors: model.layers.0.self_attn.q_proj.bias"):
        load_gguf(
            write(tmp_path / "c.gguf", values | {"blk.0.attn_q.bias": values["output_norm.weight"]})
        )
    with pytest.raises(TensorError, match=r"missing tensors: model.norm.weight"):
        load_gguf(
            write(tmp_path / "d.gguf", {k: v for k, v in values.items() if "output_norm" not in k})
        )
    with pytest.raises(GgufError, match="does not exist"):
        load_gguf(tmp_path / "nowhere.gguf")


def header(tensor_count=0, value_count=0, body=b"", version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensor_count, value_count) + body


def text(value, count=None):
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if count is None else count) + raw


def tensor(name, shape, kind=0, offset=0):
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


HUGE = 2**62
LIES = {
    "magic": header(magic=b"GGML"),
    "old": header(version=1),
    "big-endian": header(version=3 << 24),
    "values": header(value_count=HUGE),
    "tensors": header(tensor_count=HUGE),
    "key": header(value_count=1, body=text("k", HUGE)),
    "text": header(value_count=1, body=text("k") + struct.pack("<I", 8) + text("v", HUGE)),
    "not-utf8": header(value_count=1, body=text(b"\xff")),
    "kind": header(value_count=1, body=text("k") + struct.pack("<I", 77)),
    "bytes": header(value_count=1, body=text("k") + struct.pack("<IIQ", 9, 0, HUGE)),
    "strings": header(value_count=1, body=text("k") + struct.pack("<IIQ", 9, 8, HUGE)),
    "nested": header(value_count=1, body=text("k") + struct.pack("<IIQIQ", 9, 9, HUGE, 9, HUGE)),
    "twice": header(value_count=2, body=2 * (text("k") + struct.pack("<II", 4, 1))),
    "alignment": header(value_count=1, body=text("general.alignment") + struct.pack("<II", 4, 0)),
    "axes": header(1, body=text("t") + struct.pack("<I", 2**31)),
    "shape": header(1, body=tensor("t", (HUGE, HUGE, HUGE))),
    "empty": header(1, body=tensor("t", (0,))),
    "block": header(1, body=tensor("t", (33,), kind=8)),
    "unknown": header(1, body=tensor("t", (32,), kind=999)),
    "offset": header(1, body=tensor("t", (1,), offset=HUGE)),
    "overlap": header(2, body=tensor("t", (8,)) + tensor("u", (8,), offset=4)) + bytes(128),
    "same-name": header(2, body=2 * tensor("t", (8,))) + bytes(128),
}


@pytest.mark.parametrize("name", LIES)
def test_lying_files_are_refused(name, tmp_path):
    path = tmp_path / "lie.gguf"
    path.write_bytes(LIES[name] + bytes(24))
    with pytest.raises(GgufError) as caught:
        load_gguf(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_files_are_refused_or_read(good, tmp_path):
    """Cut anywhere, or with any one byte of the header changed: an error of ours or a model."""
    whole = good.read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.gguf"
    with GgufFile(good) as file:
        start = min(place.offset for place in file._places.values())
    for cut in rng.integers(0, len(whole), 20):
        path.write_bytes(whole[:cut])
        with pytest.raises(GgufError):
            GgufFile(path)
    refused = 0
    for place in rng.integers(0, start, 40):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            with GgufFile(path) as file:
                for name in file:
                    assert file[name].nbytes <= 20 * len(whole)
        except GgufError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 5
