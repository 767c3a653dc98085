"""prepare_data: its shards train like the text they were made from; mistakes cost nothing."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as hf

from experiments.common.overrides import apply_overrides
from experiments.common.preparation import Preparation, advice, prepare
from experiments.configs import demo
from fusedkv_jax.data import (
    DataConfig,
    EmptySplitError,
    load_corpus,
    make_eval_batches,
    make_train_iterator,
)

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = [f"document {i}: " + "ä" * (i % 17) for i in range(200)]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name, texts in (("a", TEXTS[:120]), ("b", ["", *TEXTS[120:]])):
        lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def run_binary(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.prepare_data", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def documents(split):
    return sorted(split.read(i).astype(int).tolist() for i in range(len(split.lengths)))


def test_end_to_end(source, tmp_path):
    output = tmp_path / "new" / "tokens"
    settings = ["--text_key=body", "--holdout_fraction=0.2", "--num_shards=3"]
    done = run_binary(f"--input={source}", f"--output_dir={output}", *settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in output.parent.iterdir()] == ["tokens"]

    changes = {"seq_len": 32, "batch_size": 4, "holdout_fraction": 0.2}
    text = load_corpus(DataConfig(source=str(source), text_key="body", **changes))
    config = DataConfig(source=str(output), **changes)
    tokens = load_corpus(config)
    assert documents(tokens.train) == documents(text.train)
    assert documents(tokens.heldout) == documents(text.heldout)
    assert tokens.heldout.num_bytes.sum() == text.heldout.num_bytes.sum()
    counts = f"{len(text.train.lengths)} documents, {text.train.lengths.sum()} tokens"
    assert done.stdout.splitlines()[0].startswith(f"train: {counts}, ")

    iterator = make_train_iterator(config)
    for _ in range(5):
        next(iterator)
    state, expected = iterator.get_state(), next(iterator)
    iterator = make_train_iterator(config)
    iterator.set_state(state)
    np.testing.assert_array_equal(next(iterator)["tokens"], expected["tokens"])
    total = sum(batch["num_bytes"] for batch in make_eval_batches(config))
    assert total == text.heldout.num_bytes.sum()

    again = run_binary(f"--input={source}", f"--output_dir={output}", *settings)
    assert again.returncode == 2
    assert again.stderr == (
        f"error: output_dir {output} is not empty; name a new folder or remove it\n"
    )
    assert documents(load_corpus(config).train) == documents(text.train)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --output_dir is missing; "),
        (["--output_dir=x", "--input=nowhere"], "error: no such file or folder: 'nowhere'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message):
    done = run_binary(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_metadata(source, tmp_path):
    output = tmp_path / "tokens"
    made = prepare(
        Preparation(input=[str(source)], output_dir=str(output), text_key="body", num_shards=2)
    )
    metadata = json.loads((output / "metadata.json").read_text())
    assert metadata == {"format": "fusedkv_jax.tokens", "version": 1, **made}
    assert metadata["train"]["documents"] + metadata["heldout"]["documents"] == len(TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert metadata["train"]["bytes"] + metadata["heldout"]["bytes"] == size
    tokens = size + len(TEXTS)  # A byte each, and EOS.
    assert metadata["train"]["tokens"] + metadata["heldout"]["tokens"] == tokens
    assert metadata["tokenizer"]["name"] == "byte" and metadata["dtype"] == "<u2"
    assert [entry["file"] for entry in metadata["sources"]] == ["a.jsonl", "b.jsonl"]
    assert sorted(path.name for path in output.iterdir() if path.suffix == ".arrayrecord") == [
        "heldout-00000-of-00001.arrayrecord",
        "train-00000-of-00002.arrayrecord",
        "train-00001-of-00002.arrayrecord",
    ]


def test_a_large_vocabulary_and_another_tokenizer(source, tmp_path):
    vocabulary = {"document": 70_000, ":": 1, "</s>": 2, "[UNK]": 3}
    tokenizer = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    output = tmp_path / "tokens"
    prepare(
        Preparation(
            input=[str(source)], output_dir=str(output), text_key="body", tokenizer=str(path)
        )
    )
    changes = {"source": str(output), "seq_len": 32, "batch_size": 4}
    corpus = load_corpus(DataConfig(tokenizer=str(path), **changes))
    assert corpus.train.read(0).tolist()[:4] == [2, 70_000, 3, 1]
    with pytest.raises(ValueError, match="were made with tokenizer 'tokenizer.json' "):
        load_corpus(DataConfig(**changes))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.jsonl", b'{"body": "ok"}\n{"body": "\xff"}\n', "c.jsonl:2: byte 25 "),
        ("c.txt", b"ok \xff", "c.txt: byte 3 "),
        ("c.arrayrecord", b"", "is a shard of tokens already; --input takes text"),
    ],
)
def test_a_bad_input_leaves_nothing_behind(source, tmp_path, name, data, message):
    (source / name).write_bytes(data)
    output = tmp_path / "tokens"
    with pytest.raises(ValueError, match=message):
        prepare(
            Preparation(
                input=[str(source), str(source / name)], output_dir=str(output), text_key="body"
            )
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


def test_no_text(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"no text in 1 file\(s\) of "):
        prepare(Preparation(input=[str(tmp_path / "a.txt")], output_dir=str(tmp_path / "tokens")))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_output_dir_is_a_file(source, tmp_path):
    output = tmp_path / "tokens"
    output.write_text("mine")
    with pytest.raises(ValueError, match="tokens is a file; name a folder"):
        prepare(Preparation(input=[str(source)], output_dir=str(output)))
    assert output.read_text() == "mine"


def test_an_empty_output_dir_and_max_documents(source, tmp_path):
    output = tmp_path / "tokens"
    output.mkdir()
    made = prepare(
        Preparation(
            input=[str(source / "b.jsonl"), str(source / "a.jsonl")],
            output_dir=str(output),
            text_key="body",
            num_shards=1,
            max_documents=90,
            holdout_fraction=0.0,
        )
    )
    assert made["train"]["documents"] == 90
    corpus = load_corpus(DataConfig(source=str(output), seq_len=8, batch_size=1))
    texts = [bytes(corpus.train.read(i)[1:-1].astype(np.uint8)).decode() for i in range(90)]
    assert texts == [*TEXTS[120:], *TEXTS[:10]]  # The order of the inputs, empty ones left out.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_shards": 0}, "num_shards=0; use a whole number from 1 to 1024"),
        ({"max_documents": 0}, "max_documents=0; use a whole number of at least 1 or None"),
        ({"holdout_fraction": 2.0}, "holdout_fraction=2.0; use a number from 0 to 1"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError) as error:
        Preparation(input=["x"], output_dir="y", **changes)
    assert str(error.value) == message


def test_what_it_advises_works_as_it_is(tmp_path):
    (tmp_path / "few.jsonl").write_text('{"text": "a b"}\n{"text": "b a"}\n')
    hf.Tokenizer(hf.models.WordLevel({"a": 0, "b": 1, "</s>": 299}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    settings = Preparation(
        input=[str(tmp_path / "few.jsonl")],
        output_dir=str(tmp_path / "tokens"),
        tokenizer=str(tmp_path / "tokenizer.json"),
        num_shards=1,
        holdout_fraction=0.0,
    )
    line = advice(settings, prepare(settings))
    overrides = re.findall(r"--config\.(\S+?)(?:,|\s|$)", line)
    config = apply_overrides(demo.get_config(), overrides)
    assert config.train.eval_batches == 0 and config.model.vocab_size == 300
    assert next(make_train_iterator(config.data))["tokens"].max() == 299
    with pytest.raises(EmptySplitError, match="prepare the shards again.*train.eval_batches=0"):
        make_eval_batches(config.data)


@pytest.mark.parametrize("changes", [{"num_shards": 99999}, {"max_document_mib": 0}])
def test_numbers_out_of_reason_are_refused(changes):
    with pytest.raises(ValueError, match="=(99999|0); use a whole number from 1 to 1024"):
        Preparation(input=["x"], output_dir="y", **changes)


def test_held_out_files_among_the_input_are_not_trained_on(source, tmp_path, monkeypatch, capsys):
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    settings = Preparation(
        input=[str(source)],
        heldout=["link/b.jsonl"],
        output_dir=str(tmp_path / "tokens"),
        text_key="body",
        num_shards=1,
        holdout_fraction=0.0,
    )
    metadata = prepare(settings)
    printed = capsys.readouterr().out
    assert printed == f"1 file(s) of --input are held out, not trained on: {source}/b.jsonl\n"
    assert [entry["file"] for entry in metadata["sources"]] == ["a.jsonl", "b.jsonl"]
    corpus = load_corpus(DataConfig(source=str(tmp_path / "tokens"), seq_len=8, batch_size=1))
    for split, texts in ((corpus.train, TEXTS[:120]), (corpus.heldout, TEXTS[120:])):
        assert documents(split) == sorted([256, *text.encode(), 257] for text in texts)


def test_an_input_that_is_held_out_whole(source, tmp_path):
    settings = Preparation(
        input=[f"{source}/*.jsonl"], heldout=[str(source)], output_dir=str(tmp_path / "tokens")
    )
    with pytest.raises(ValueError) as error:
        prepare(settings)
    assert str(error.value) == (
        "nothing to train on: --heldout names every file of --input; name others in one of them"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_text_of_its_own_is_held_out_whole(source, tmp_path):
    own = [f"held out {i}" for i in range(7)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in own))
    settings = Preparation(
        input=[str(source)],
        heldout=[str(tmp_path / "own.jsonl")],
        output_dir=str(tmp_path / "tokens"),
        text_key="body",
        num_shards=2,
        holdout_fraction=0.0,
    )
    metadata = prepare(settings)
    assert metadata["heldout"]["documents"] == len(own)
    assert metadata["heldout"]["bytes"] == sum(map(len, own))
    assert [entry["file"] for entry in metadata["sources"]] == ["a.jsonl", "b.jsonl", "own.jsonl"]
    corpus = load_corpus(DataConfig(source=str(tmp_path / "tokens"), seq_len=8, batch_size=1))
    assert len(corpus.train.lengths) == len(TEXTS)
    assert [bytes(corpus.heldout.read(i)[1:-1].astype("u1")).decode() for i in range(7)] == own
