"""Tokenizers of GGUF files: what libraries put around a text is what the file says."""

import json

import pytest
import tokenizers as hf

from fusedkv_jax.data import tokenizers
from fusedkv_jax.data.chat import load_template
from fusedkv_jax.interop import save_gguf_tokenizer

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

TOKENS = ["<s>", "</s>", "a", "b", "aa"]
BOS, EOS, A, B = range(4)


def write(path, pre, template=None, **added):
    """A file with nothing but a vocabulary; `added` has add_bos_token and add_eos_token."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control, control, normal, normal, normal])
    writer.add_token_merges(["a a"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    for name, value in added.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    if template is not None:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("pre", "added", "one", "two"),
    [
        ("gpt-2", {}, [A, B], [A, B]),
        ("gpt-2", {"add_bos_token": True}, [BOS, A, B], [BOS, A, BOS, B]),
        ("gpt-2", {"add_eos_token": True}, [A, B, EOS], [A, EOS, B, EOS]),
        ("llama-bpe", {"add_eos_token": True}, [BOS, A, B, EOS], [BOS, A, EOS, BOS, B, EOS]),
        ("llama-bpe", {"add_bos_token": False}, [A, B], [A, B]),
    ],
)
def test_bos_and_eos_go_around_a_text_as_the_file_says(tmp_path, pre, added, one, two):
    save_gguf_tokenizer(write(tmp_path / "model.gguf", pre, **added), tmp_path)
    theirs = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("ab").ids == one
    assert theirs.encode("a", "b").ids == two
    assert theirs.encode("ab", add_special_tokens=False).ids == [A, B]
    assert tokenizers.load(str(tmp_path)).encode("ab") == [A, B]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] == (BOS in one)
    assert config["add_eos_token"] == (EOS in one)


@pytest.mark.parametrize("with_tools", [False, True])
def test_chat_templates_are_found(tmp_path, with_tools):
    plain, tools = "plain", "{{ tools }}"
    named = {"default": plain, "tool_use": tools, "rag": "neither"}
    several = [{"name": name, "template": text} for name, text in named.items()]
    write(tmp_path / "model.gguf", "gpt-2", template=several if with_tools else plain)
    save_gguf_tokenizer(tmp_path / "model.gguf", tmp_path / "tokenizer")
    template = load_template(tmp_path / "tokenizer")
    messages = [{"role": "user", "content": "x"}]
    assert template.render(messages) == "plain"
    assert template.render(messages, tools=[1]) == ("[1]" if with_tools else "plain")
