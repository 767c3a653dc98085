"""The corpus: what is read and held out, and what is said when there is nothing."""

import hashlib
import json

import numpy as np
import pytest

from fusedkv_jax.data import DataConfig, corpus, load_corpus
from fusedkv_jax.data.corpus import is_held_out
from fusedkv_jax.data.formats import Document


def config(source, **changes):
    return DataConfig(**{"source": str(source), "seq_len": 8, "batch_size": 2, **changes})


def texts(documents):
    return [
        bytes(documents.read(i)[1:-1].astype(np.uint8)).decode()
        for i in range(len(documents.lengths))
    ]


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_documents_begin_with_bos_and_end_with_eos(tmp_path):
    (tmp_path / "a.txt").write_text("aä")
    corpus = load_corpus(config(tmp_path, holdout_fraction=0.0))
    np.testing.assert_array_equal(corpus.train.read(0), [256, 97, 0xC3, 0xA4, 257])
    assert corpus.train.lengths.tolist() == [4]
    assert corpus.train.num_bytes.tolist() == [3]


def test_the_split_is_a_partition_by_the_hash_of_the_text(tmp_path):
    all_texts = [f"document {i}" for i in range(1000)]
    write_lines(tmp_path / "a.jsonl", all_texts)
    corpus = load_corpus(config(tmp_path, holdout_fraction=0.1))
    train, heldout = texts(corpus.train), texts(corpus.heldout)
    assert sorted(train + heldout) == sorted(all_texts)
    assert 70 <= len(heldout) <= 130  # Binomial(1000, 0.1) within three deviations.
    expected = [
        text
        for text in all_texts
        if int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) / 2**64 < 0.1
    ]
    assert heldout == expected


def test_more_files_move_no_document(tmp_path):
    write_lines(tmp_path / "m.jsonl", [f"old {i}" for i in range(200)])
    before = load_corpus(config(tmp_path, holdout_fraction=0.2))
    write_lines(tmp_path / "a.jsonl", [f"new {i}" for i in range(200)])
    after = load_corpus(config(tmp_path, holdout_fraction=0.2))
    for split in ("train", "heldout"):
        old = [text for text in texts(getattr(after, split)) if text.startswith("old")]
        assert old == texts(getattr(before, split))


def test_a_larger_fraction_holds_out_a_superset():
    documents = [f"document {i}".encode() for i in range(300)]
    chosen = [
        {text for text in documents if is_held_out(text, fraction)}
        for fraction in (0.0, 0.1, 0.5, 1.0)
    ]
    assert not chosen[0] and len(chosen[3]) == 300
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3]


def test_max_documents(tmp_path):
    write_lines(tmp_path / "a.jsonl", ["a", "", "b", "c"])
    corpus = load_corpus(config(tmp_path, max_documents=2, holdout_fraction=0.0))
    assert texts(corpus.train) == ["a", "b"]


def test_a_source_without_text(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError) as error:
        load_corpus(config(tmp_path))
    assert str(error.value) == f"{tmp_path}: no text in 2 file(s)"


def test_more_text_than_fits_in_memory_is_refused(tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", ["x" * 100] * 50)
    monkeypatch.setattr(corpus, "MAX_BYTES_IN_MEMORY", 4000)
    with pytest.raises(ValueError, match="write shards with experiments.prepare_data"):
        load_corpus(config(tmp_path))


def test_texts_are_tokenised_in_groups_of_bounded_size():
    documents = [Document("x" * 2**20, "", 0)] * 10 + [Document("y", "", 0)] * 300
    groups = [len(group) for group in corpus._groups(documents)]
    assert sum(groups) == 310 and groups[0] == 4 and max(groups) == 256
