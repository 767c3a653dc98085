"""Folders that are not trusted: every hostile value is one line, and nothing is executed."""

import json
import struct

import pytest

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.interop import config_from_huggingface, config_to_huggingface, load_huggingface
from tests.interop.test_huggingface_config import MINIMAL
from tests.interop.test_safetensors_folder import CONFIG

HOSTILE = (-1, 0, 0.5, 10**18, 1e308, "x", "../x", [], [1], {}, {"a": 1}, True, float("nan"))
FIELDS = (
    *MINIMAL,
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "hidden_act",
    "tie_word_embeddings",
    "initializer_range",
    "sliding_window",
    "layer_types",
    "torch_dtype",
)
FAMILIES = ("llama", "mistral", "qwen2", "gemma3_text", "gpt_neox", "granite", "smollm3")


@pytest.mark.parametrize("field", FIELDS)
def test_hostile_values_are_one_line_or_a_configuration(field):
    """Each value in one family and another; every family meets each field."""
    for number, value in enumerate(HOSTILE, FIELDS.index(field)):
        for family in (FAMILIES[0], FAMILIES[1 + number % (len(FAMILIES) - 1)]):
            fields = MINIMAL | {"model_type": family} | {field: value}
            try:
                config = config_from_huggingface(fields)
            except ValueError as error:
                assert "\n" not in str(error), (family, value)
            else:
                assert isinstance(config, ModelConfig)


def fields_of_a_model(**changes):
    return json.dumps(config_to_huggingface(CONFIG) | changes)


def header(content, length=None):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def entry(shape=(1,), dtype="F32", offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


NAME = "model.embed_tokens.weight"
FILES = {
    "nothing": b"",
    "no-header": bytes(4),
    "absurd-length": header({}, 2**60),
    "not-json": header(b"{" * 1000),
    "no-object": header([1]),
    "outside": header({NAME: entry((2**40,), offsets=(0, 2**42))}),
    "backwards": header({NAME: entry(offsets=(4, 0))}) + bytes(4),
    "lying-shape": header({NAME: entry((2**40,))}) + bytes(4),
    "overlap": header({NAME: entry(), "b": entry()}) + bytes(4),
    "negative": header({NAME: entry((-1,))}) + bytes(4),
    "type": header({NAME: entry(dtype="PICKLE")}) + bytes(4),
    "pickle": b"\x80\x04cposix\nsystem\nV/bin/false\n\x85R.",
}


@pytest.mark.parametrize("name", FILES)
def test_hostile_weight_files_are_one_line(name, tmp_path):
    (tmp_path / "config.json").write_text(fields_of_a_model())
    (tmp_path / "model.safetensors").write_bytes(FILES[name])
    with pytest.raises(ValueError) as caught:
        load_huggingface(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["vocab_size", "intermediate_size"])
def test_sizes_are_compared_before_memory_is_taken(field, tmp_path):
    (tmp_path / "config.json").write_text(fields_of_a_model(**{field: 2**40}))
    (tmp_path / "model.safetensors").write_bytes(header({NAME: entry()}) + bytes(4))
    with pytest.raises(ValueError, match="missing tensors"):
        load_huggingface(tmp_path)


def test_code_of_a_folder_is_never_run(tmp_path):
    """`auto_map` names code that transformers would run on request."""
    ran = tmp_path / "ran"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(ran)!r}, 'w')")
    (tmp_path / "config.json").write_text(
        fields_of_a_model(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    )
    (tmp_path / "model.safetensors").write_bytes(header({NAME: entry()}) + bytes(4))
    with pytest.raises(ValueError, match="missing tensors"):
        load_huggingface(tmp_path)
    assert not ran.exists()
