"""A run keeps its tokenizer: a file that is replaced or moved later changes nothing in silence."""

import json
import pathlib
import subprocess

import pytest
import tokenizers as hf

from fusedkv_jax.data import chat, tokenizers
from fusedkv_jax.training.checkpointing.tokenizer_files import (
    TokenizerChangedError,
    keep_tokenizer,
    kept_tokenizer,
)


def write_tokenizer(folder: pathlib.Path, words: list[str]) -> pathlib.Path:
    vocabulary = {word: i for i, word in enumerate([*words, "</s>"])}
    model = hf.models.WordLevel(vocabulary, unk_token=words[0])
    folder.mkdir(exist_ok=True)
    hf.Tokenizer(model).save(str(folder / "tokenizer.json"))
    entries = {"eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(entries))
    return folder / "tokenizer.json"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The name, relative, of a tokenizer, and the work directory of a run that keeps it."""
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "mine", ["a", "b", "c"])
    (tmp_path / "mine" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "mine" / "additional_chat_templates").mkdir()
    (tmp_path / "mine" / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    workdir = tmp_path / "run"
    workdir.mkdir()
    assert kept_tokenizer("mine/tokenizer.json", workdir) == "mine/tokenizer.json"
    assert keep_tokenizer("mine/tokenizer.json", workdir) == str(workdir / "tokenizer")
    return "mine/tokenizer.json", workdir


def test_the_copy_serves_from_anywhere_with_its_chat_templates(run, monkeypatch):
    name, workdir = run
    original = tokenizers.load(name)
    monkeypatch.chdir("/")
    copy = kept_tokenizer(name, workdir)
    assert tokenizers.load(copy).fingerprint == original.fingerprint
    template, messages = chat.load_template(copy), [{"role": "user", "content": "x"}]
    assert template.render(messages) == "x"
    assert template.render(messages, tools=[{}]) == "with tools"
    assert keep_tokenizer(name, workdir) == copy  # the original is not needed any more
    assert keep_tokenizer(copy, workdir) == copy  # and the copy may be named itself
    sums = ["sha256sum", "-c", "--quiet", "SHA256SUMS"]
    subprocess.run(sums, cwd=copy, check=True)


def test_another_tokenizer_under_the_same_name_is_refused(run):
    name, workdir = run
    write_tokenizer(pathlib.Path("mine"), ["c", "b", "a"])
    with pytest.raises(TokenizerChangedError, match="is not the one that the run in .* began with"):
        keep_tokenizer(name, workdir)
    assert tokenizers.load(kept_tokenizer(name, workdir)).encode("a") == [0]


@pytest.mark.parametrize("harm", ["change", "remove"])
@pytest.mark.parametrize("file", ["tokenizer.json", "additional_chat_templates/tool_use.jinja"])
def test_a_copy_that_is_not_as_it_was_is_refused(run, harm, file):
    name, workdir = run
    path = workdir / "tokenizer" / file
    if harm == "change":
        path.write_text(path.read_text().replace("t", "z"))
    else:
        path.unlink()
    with pytest.raises(TokenizerChangedError, match=f"'{file}' is not as it was"):
        kept_tokenizer(name, workdir)


def test_what_is_no_copy_stays(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="move it away"):
        keep_tokenizer(str(write_tokenizer(tmp_path / "given", ["a"])), tmp_path)
    assert (tmp_path / "tokenizer" / "notes").read_text() == "mine"
    assert keep_tokenizer("byte", tmp_path) == "byte"
